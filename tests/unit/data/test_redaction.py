"""What may leave the process: secrets, terminal escapes, and how much of a value a message repeats."""

import pytest

from data.redaction import holds_secret, message, printable, quote, redact, unsigned


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/a@b.tar", "https://***@host/a@b.tar"),
        ("https://me:p@w@host/x", "https://***@host/x"),
        ("[https://me:p/w@host]", "[https://***@host]"),
        ("s3://bucket/x?X-Amz-Signature=pw&part=1", "s3://bucket/x?X-Amz-Signature=***&part=1"),
        ("found hf_aBcDeFgHiJkLmNoPqRsTuV.", "found ***."),
    ],
)
def test_secrets(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/path@v2/x.tar", "s3://bucket/key=1/a.tar", "https://me:${PASSWORD}@host/x",
        "https://host/x?sig=${SIGNATURE}", "must have the form section.key=value", "data.characters_per_token: text",
        "a sign that says token=5",
    ],
)  # fmt: skip
def test_what_is_no_secret(text: str) -> None:
    assert not holds_secret(text)
    if "me:" not in text:
        assert redact(text) == text


@pytest.mark.parametrize(
    ("url", "identity"),
    [
        ("https://me:pw@host/a.tar", "https://host/a.tar"),
        ("https://host/download?path=/x&file=a.tar", "https://host/download?path=/x&file=a.tar"),
        ("https://host/d?key=a.tar&Expires=1&Signature=x&Key-Pair-Id=K&AWSAccessKeyId=A", "https://host/d?key=a.tar"),
        (
            "https://host/a.tar?X-Amz-Date=1&X-Amz-Signature=2&versionId=3&x-goog-date=4",
            "https://host/a.tar?versionId=3",
        ),
        ("https://a.blob/x/a.tar?sv=1&se=2&sr=b&sp=r&sig=3", "https://a.blob/x/a.tar"),
        ("https://host/d?st=a.tar&sp=1", "https://host/d?st=a.tar&sp=1"),
        ("https://host/d?f=a.tar&token=1&api_key=2&auth%5Ftoken=3", "https://host/d?f=a.tar"),
        ("https://host/d?tokenizer=t5&keyword=k", "https://host/d?tokenizer=t5&keyword=k"),
    ],
)
def test_an_identity_has_no_signature_and_keeps_what_names_the_file(url: str, identity: str) -> None:
    assert unsigned(url) == identity


def test_a_message_is_redacted_and_printable() -> None:
    text = "\x1b[2Jpassword: hunter2\n\u202e\ud800\x9b"
    assert message(text) == "\\x1b[2Jpassword: ***\n\\u202e\\ud800\\x9b"
    assert printable(text).encode()


def test_a_quote_is_a_short_line_at_the_cost_of_a_short_one() -> None:
    deep = ["https://me:hunter2@host"]
    for _ in range(60):
        deep = [deep] * 9  # 9**60 items
    for value in (deep, "x\n" * 10**6, 10**10_000, {"a" * 999: b"\x1b" * 999}, ["https://me:hunter2@" + "h" * 999]):
        assert len(text := quote(value)) <= 160
        assert text.isprintable()
        assert "hunter2" not in text
    assert quote("a: b") == "'a: b'"
