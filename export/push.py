"""An exported folder, sent to a model hub. The token comes from the environment, and stands in no message."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from data.config import NONE
from data.redaction import one_line, remember
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError

from .card import is_hub_id
from .diffusers_folder import Encoders


def check_push(repo: str, config: TrainConfig, encoders: Encoders) -> str:
    """The token with which a folder can be pushed to user/name. Raises ConfigError where it is clear that none can, or
    that nobody else could load it."""
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo!r} is no user/name: {error}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"--push {repo!r} is no user/name, as in me/my-model")
    sections = [config.autoencoder, *(config.text_encoder.models if config.label_classes is None else [])]
    here = [section.path for section in sections if section.path != NONE and not is_hub_id(section.path)]
    if encoders == "reference" and here:
        raise ConfigError(f"--push with --encoders reference: {here[0]} is a folder of this machine; copy the encoders")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push needs the network, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it: unset it")
    token = huggingface_hub.get_token()
    if not token:
        raise ConfigError("--push needs a token with the right to write: give it in HF_TOKEN, or by `hf auth login`")
    remember("HF_TOKEN", token)  # from here on no message shows it
    return token


def push(folder: Path, repo: str, private: bool, token: str) -> str:
    """Send the folder as one commit, to a repository that is made where there is none; returns its address. Raises
    ConfigError, whatever goes wrong on the way: the folder is complete, and stays. private: only to one that is."""
    try:
        api = huggingface_hub.HfApi(token=token)
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        # Of one that was there, create_repo changes nothing.
        is_open = private and api.model_info(repo).private is not True
        if not is_open:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from muDiT")
    # Of many libraries, and a traceback would quote what they were called with.
    except Exception as error:
        raise ConfigError(
            f"{folder} is written, but could not be pushed to {repo}: {_reason(error)}. "
            f"Then send it by `hf upload {repo} {folder} .{' --private' if private else ''}`"
        ) from None
    if is_open:
        raise ConfigError(
            f"{folder} is written, but {repo} is not private at {constants.ENDPOINT}, and nothing was sent: make it "
            "private there, or name another repository, or leave --private out"
        )
    return str(url)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):  # past "Error while uploading"
        error = error.__cause__
    code, said = None, str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        code, said = error.response.status_code, error.server_message or said
    said = one_line(said, 300).rstrip(".")
    if code in (401, 403):
        return f"{constants.ENDPOINT} does not give this token the right to write there ({code}: {said})"
    return f"{constants.ENDPOINT} answers {code}: {said}" if code else f"{constants.ENDPOINT}: {said}"
