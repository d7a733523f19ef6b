"""Whatever is written in a spec, the answer is a spec or an error in lines."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftwork.operators.errors import ConfigError
from graftwork.pipelines.spec.loading import load_resolved
from graftwork.pipelines.spec.problems import MAX_LINES
from graftwork.pipelines.spec.reference import keys

GOOD = """\
pipeline: p
dataset: {train: train.parquet, test: [a.parquet, "s3://b/*.parquet"]}
scenario:
  kind: class_incremental
  increment: 10
backbone:
  model: vit
methods:
  - simplecil
  - ranpac: {projection_dim: 2000, lr: 1e-3}
"""
DOMAINS = GOOD.replace("class_incremental\n  increment: 10", "domain_incremental").replace(
    "{train", "{domain: style, train"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = st.sampled_from(
    [
        *("", "a", "natural", "digits", "random", "1e-3", "s3://b", "x::y", "null", "true", "~"),
        *("*a", "&a ", "!!str ", "? ", "- ", ": ", "#", "%", "'", '"', "{", "]", "\n", "\t"),
        *("[[1, 2]]", "[natural, 1]", "{count: 3}", "{train: 1}", ".nan", "1e999"),
        *("9" * 30, "9" * 5000, "\0", "\u2028"),
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [key.path for key in keys()] + ["methods.0", "graftwork.methods.1.ranpac.x", "x", "0"]
)
FUZZ = settings(
    derandomize=True,
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def spec_or_lines(source: str, overrides: list[str]) -> None:
    """A spec that survives its own resolved text, or short lines that say what is wrong."""
    try:
        loaded = load_resolved(source, overrides)
    except ConfigError as error:
        lines = str(error).split("\n")
        assert all(lines) and len(lines) <= MAX_LINES + 10
        assert all(line.isprintable() and "Traceback" not in line for line in lines)
    else:
        Path("again.yaml").write_text(loaded.text, encoding="utf-8")
        assert load_resolved("again.yaml").spec == loaded.spec


@FUZZ
@given(st.data())
def test_mutated_text_gives_a_spec_or_an_error(folder: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([GOOD, DOMAINS]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(WORDS | st.text(max_size=4)) + text[end:]
    Path("conf.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    spec_or_lines("conf.yaml", [])


@FUZZ
@given(st.lists(st.tuples(KEYS, ANYTHING), min_size=1, max_size=4), st.booleans())
def test_random_values_give_a_spec_or_an_error(
    folder: Path, changes: list[tuple[str, object]], domains: bool
) -> None:
    Path("conf.yaml").write_text(DOMAINS if domains else GOOD, encoding="utf-8")
    texts = [
        v if isinstance(v, str) else yaml.safe_dump(v, default_flow_style=True) for _, v in changes
    ]
    spec_or_lines(
        "conf.yaml", [f"{key}={text}" for (key, _), text in zip(changes, texts, strict=True)]
    )
