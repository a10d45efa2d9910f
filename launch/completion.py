"""Print what a shell needs to complete `mudit`: commands, their options, names of configs, keys as section.key=.

mudit completion bash > ~/.local/share/bash-completion/completions/mudit
mudit completion zsh > ~/.mudit.zsh                        and `source ~/.mudit.zsh` in ~/.zshrc, after compinit
mudit completion fish > ~/.config/fish/completions/mudit.fish

Configs are looked up when Tab is pressed. Commands, options and keys are those of this version: write it anew then.
"""

import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Mapping
from typing import NamedTuple

from launch.common import command, run
from launch.mudit import PARALLEL, commands
from trainer.config.help import sections
from trainer.config.yaml_files import CONFIG_DIR

_BASH = """\
_mudit() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" parts="" options="" keys="" words
    COMPREPLY=()
    case "${COMP_WORDS[1]}" in
@CASES@
    esac
    if [ "$COMP_CWORD" = 1 ]; then
        words="@COMMANDS@"
    elif [ "$before" = --config ]; then
        words=$(cd @CONFIGS@ 2> /dev/null && find . -name '*.yaml' | sed 's|^./||')
    elif [ "$before" = = ] || [ "$word" = = ]; then # a value: files
        return
    else
        case "$word" in
            -*) words="$options" ;;
            *) words="$keys"; [ "$COMP_CWORD" != 2 ] || words="$parts $keys" ;;
        esac
    fi
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -W "$words" -- "$word")
    case "${COMPREPLY[0]}" in
        *=) [ "${#COMPREPLY[@]}" != 1 ] || compopt -o nospace 2> /dev/null || true ;;
    esac
}
complete -o default -F _mudit mudit
"""


class Words(NamedTuple):
    """What may follow a command. parts: commands within it. keys: whether it takes section.key=value."""

    parts: list[str]
    options: list[str]
    keys: bool


def main() -> int:
    parser = command(__doc__, config=False, overrides=None)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args().shell
    words = {name: words_of(name) for name in commands()}
    keys = [f"{key.name}=" for section in sections() for key in section.keys]
    keys = sorted({key for key in keys if "[" not in key and ".NAME." not in key})
    if shell == "fish":
        print(fish(words, keys), end="")
    else:
        print("autoload -Uz bashcompinit && bashcompinit\n" * (shell == "zsh") + bash(words, keys), end="")
    return 0


def words_of(name: str) -> Words:
    """From the help of a command and of those within it."""
    text = _help(name)
    found = re.search(r"^  \{([\w,-]+)\}", text, re.MULTILINE)
    parts = found[1].split(",") if found else []
    texts = [text, *(_help(name, part) for part in parts)]
    options = {option for each in texts for option in re.findall(r"^  (?:-\w, )?(--[\w-]+)", each, re.MULTILINE)}
    options |= {"--gpus"} if name in PARALLEL else set()
    return Words(parts, sorted(options), any("key=value ...]" in each.partition("\n\n")[0] for each in texts))


def _help(name: str, *parts: str) -> str:
    module = importlib.import_module(f"launch.{name.replace('-', '_')}")
    before, sys.argv = sys.argv, [f"mudit {name}", *parts, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = before
    return said.getvalue()


def bash(words: Mapping[str, Words], keys: list[str]) -> str:
    """The function of bash, which zsh's bashcompinit takes as well."""
    cases = [
        f'        {name}) parts="{" ".join(each.parts)}" options="{" ".join(each.options)}"'
        + (' keys="$_mudit_keys"' if each.keys else "")
        + " ;;"
        for name, each in words.items()
    ]
    script = _BASH.replace("@CASES@", "\n".join(cases)).replace("@COMMANDS@", " ".join(words))
    return f'_mudit_keys="{" ".join(keys)}"\n' + script.replace("@CONFIGS@", shlex.quote(str(CONFIG_DIR)))


def fish(words: Mapping[str, Words], keys: list[str]) -> str:
    """The lines of fish."""
    does, folder = commands(), shlex.quote(str(CONFIG_DIR))
    lines = [f"complete -c mudit -n __fish_use_subcommand -xa {name} -d {_quoted(does[name])}" for name in words]
    for name, each in words.items():
        after = f"complete -c mudit -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{after} -l {option[2:]}" for option in each.options if option != "--config"]
        if "--config" in each.options:
            lines.append(f"{after} -l config -ra \"(cd {folder}; and find . -name '*.yaml' | string sub -s 3)\"")
        lines += [f"{after} -a {_quoted(' '.join(each.parts))}"] * bool(each.parts)
        lines += [f'{after} -a "$_mudit_keys"'] * each.keys
    return "\n".join([f"set -g _mudit_keys {' '.join(keys)}", *lines, ""])


def _quoted(text: str) -> str:
    """A word of fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    run(main)
