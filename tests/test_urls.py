"""Which places may be read and written."""

import pytest

from graftwork.operators.errors import ConfigError
from graftwork.operators.files.urls import check, has_credentials, mask


@pytest.mark.parametrize(
    "place",
    [
        "data/train.parquet",
        "../data",
        "-dash.parquet",
        "with blanks/ünïcode/火.png",
        "x" * 300,
        "./~tilde inside",
        "train-?.parquet",
        "file:///srv/data",
        "s3://bucket/train-*.parquet",
        "gs://bucket",
        "abfs://container@account.dfs.core.windows.net/path",
        "hf://datasets/uoft-cs/cifar100@main/cifar100/train-*.parquet",
        "memory://store",
    ],
)
def test_allowed_places_come_back_unchanged(place: str) -> None:
    assert check(place) == place


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "is empty; give a path or URL"),
        ("foo://x", 'protocol "foo" not supported (file, s3, gs, abfs, hf)'),
        ("http://h/x", 'protocol "http" not supported (file, s3, gs, abfs, hf)'),
        ("https://h/x", 'protocol "https" not supported (file, s3, gs, abfs, hf)'),
        ("local:///etc/passwd", 'protocol "local" not supported (file, s3, gs, abfs, hf)'),
        ("data:text/plain,x", 'protocol "data" not supported (file, s3, gs, abfs, hf)'),
        (
            "simplecache::s3://b/k",
            'URL chaining not allowed ("simplecache::s3://b/k"); name one place without "::"',
        ),
        ("s3://b/../k", '".." not allowed in URLs ("s3://b/../k"); write the full path'),
        ("file:///a/..", '".." not allowed in URLs ("file:///a/.."); write the full path'),
        ("~/data", '"~" is not expanded ("~/data"); write the full path'),
        ("file://~/data", '"~" is not expanded ("file://~/data"); write the full path'),
        (
            "s3://user:secret@b/k",
            'credentials in URLs not allowed ("s3://***@b/k"); use the environment or a profile',
        ),
        (
            "s3://AKIAIOSFODNN7EXAMPLE@b/k",
            'credentials in URLs not allowed ("s3://***@b/k"); use the environment or a profile',
        ),
        (
            "s3://user@b/k",
            'user names in URLs not allowed ("s3://***@b/k"); use the environment or a profile',
        ),
        (
            "s3://b/k?endpoint_override=http://evil",
            'query strings in URLs not allowed ("s3://b/k?..."); set endpoints in the environment, '
            'and use "*" in patterns',
        ),
        ("s3://", '"s3://" names no bucket'),
        ("file://", '"file://" names no path'),
        ("a\nb", "invalid character in path (newline, NUL or another control character)"),
        ("a\0b", "invalid character in path (newline, NUL or another control character)"),
        ("a\udc80b", "invalid character in path (newline, NUL or another control character)"),
    ],
)
def test_refused_places_say_why_in_one_line(place: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(place)
    assert str(caught.value) == message


def test_mask_hides_the_secret_and_nothing_else() -> None:
    assert (
        mask("get s3://u:p@b/k with hf_abcdefghijklmnopqrst ok") == "get s3://***@b/k with *** ok"
    )
    assert mask("sha hf_short AKIA user@host") == "sha hf_short AKIA user@host"
    assert has_credentials("user:pw@host") and not has_credentials("hf://datasets/a/b@main")
