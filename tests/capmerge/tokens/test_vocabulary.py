import gzip
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.tokens import golden
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from capmerge.errors import CapmergeError, UsageError
from capmerge.tokens.chunks import kohya
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.load import load_tokenizer_file
from capmerge.tokens.tokenizer import ClipTokenizer, FileTokenizer
from capmerge.tokens.vocabulary import read_clip_vocabulary

TWO_IDS = '{"<|startoftext|>": 0, "<|endoftext|>": 1}'


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    """CLIP's own vocabulary."""
    return read_clip_vocabulary()


def write_clip_folder(folder: Path, vocabulary: Any, **special: str) -> Path:
    """A tokenizer folder as transformers 4 wrote it for the slow CLIPTokenizer."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary.ids), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, vocabulary.merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


def write_t5(path: Path, **changes: Any) -> Path:
    """Write a small tokenizer like T5's: unigrams, `_` for spaces, `</s>` at the end.

    It truncates and pads to 6 ids.
    """
    scores = {
        "<pad>": 0.0,
        "</s>": 0.0,
        "<unk>": 0.0,
        "\u2581": -2.0,
        "\u2581cat": -3.0,
        "\u2581a": -3.0,
        "s": -4.0,
    }
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6, pad_token="<pad>")
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize(("family", "pad"), [("sd1", "<|endoftext|>"), ("sd2", "!")])
def test_clip_folder(tmp_path: Path, vocabulary: Any, family: str, pad: str) -> None:
    """A CLIP folder with vocab.json and merges.txt gives the golden ids for its padding."""
    tokenizer = load_tokenizer_file(write_clip_folder(tmp_path, vocabulary, pad_token=pad))
    assert isinstance(tokenizer, ClipTokenizer)
    for line in golden("token_chunks.jsonl"):
        assert kohya(tokenizer.encode(line["text"]), 150, tokenizer) == line[f"{family}_150"]


def test_clip_tokenizer_json(tmp_path: Path, vocabulary: Any) -> None:
    """A CLIP tokenizer.json gives the golden ids, although its own pipeline has no clean-up."""
    model = models.BPE(
        vocabulary.ids, vocabulary.merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>"
    )
    file = tmp_path / "tokenizer.json"
    file.write_text(Tokenizer(model).to_str(), encoding="utf-8")
    counter = TokenCounter(load_tokenizer_file(file))
    lines = golden("token_chunks.jsonl")
    assert counter.count_tokens([line["text"] for line in lines]) == [
        line["tokens_sd1"] for line in lines
    ]


def test_added_token_with_a_space(tmp_path: Path, vocabulary: Any) -> None:
    """An added token that contains a space is found across pieces, and counted as one token."""
    folder = write_clip_folder(tmp_path, vocabulary)
    (folder / "added_tokens.json").write_text(
        json.dumps({"my cat": 49408, "my": 49409}), encoding="utf-8"
    )
    tokenizer = load_tokenizer_file(folder)
    assert tokenizer.encode("my cat, my Cat") == [49408, 267, 49409, 2368]
    assert TokenCounter(tokenizer).count_tokens(["my cat, my Cat"] * 20) == [4] * 20


def test_t5_file(tmp_path: Path) -> None:
    """Another model's ids are those of its file, without special tokens, truncation and padding."""
    tokenizer = load_tokenizer_file(write_t5(tmp_path / "tokenizer.json"))
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.n_special == 1
    text = "a cats a cat a cat a"
    assert tokenizer.encode(text) == [5, 4, 6, 5, 4, 5, 4, 5]
    assert TokenCounter(tokenizer).count_tokens([text, "", "a"]) == [8, 0, 1]
    assert "".join(piece for _, piece in tokenizer.encode_with_text(text)) == text
    assert load_tokenizer_file(tmp_path).encode(text) == tokenizer.encode(text)


def test_t5_and_a_lone_surrogate(tmp_path: Path) -> None:
    """A lone surrogate, which such files may contain, is counted as an unknown character."""
    tokenizer = load_tokenizer_file(write_t5(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a \ud83d") == tokenizer.encode("a \ufffd")


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (
            {},
            "nowhere",
            "no such file or folder. Expected a Hugging Face tokenizer folder or a tokenizer.json.",
        ),
        ({}, ".", "found nothing; expected tokenizer.json, or CLIP's vocab.json and merges.txt"),
        (
            {"config.json": "{}", "a.safetensors": ""},
            ".",
            "found a.safetensors, config.json; expected tokenizer.json",
        ),
        ({"spiece.model": ""}, ".", "AutoTokenizer"),
        ({"tokenizer/merges.txt": ""}, ".", "the folder of a model, expected that of a tokenizer."),
        ({"tokenizer.json": "not"}, ".", "tokenizer.json: not JSON: Expecting value"),
        ({"tokenizer.json": "[1]"}, ".", "found a JSON list, expected an object"),
        (
            {"vocab.json": '{"a": 1}'},
            "vocab.json",
            "found a; expected a tokenizer.json, which has a key `model`",
        ),
        (
            {"tokenizer.json": '{"model": {"type": "Nothing"}}'},
            "tokenizer.json",
            "the tokenizers library cannot build this tokenizer",
        ),
        ({"vocab.json": '{"a": 1}', "merges.txt": ""}, ".", "vocab.json: found no <|startoftext|>"),
        (
            {"vocab.json": TWO_IDS, "merges.txt": "#v\na b c"},
            ".",
            "merges.txt: found a line that is not a pair of tokens; expected a version line",
        ),
        (
            {"vocab.json": TWO_IDS, "merges.txt": "#v\na b"},
            ".",
            "its vocabulary and merges do not fit",
        ),
        (
            {
                "tokenizer.json": '{"model": {"end_of_word_suffix": "</w>", '
                f'"vocab": {TWO_IDS}}}}}'
            },
            ".",
            "the contents are not those of a Hugging Face tokenizer: KeyError('merges')",
        ),
    ],
)
def test_bad_tokenizer_paths(
    tmp_path: Path, files: dict[str, str], name: str, message: str
) -> None:
    """A path without a tokenizer raises an error that names the path and what was expected."""
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        load_tokenizer_file(tmp_path / name)
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that contains CLIP's vocabulary, the error says what to install."""

    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(CapmergeError, match="pip install openai-clip"):
        read_clip_vocabulary()


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"version\na b\n"), None])
def test_damaged_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    """A vocabulary file that is missing, broken or short is named, with the way to repair it."""
    file = tmp_path / "vocabulary.gz"
    if content is not None:
        file.write_bytes(content)

    class Distribution:
        def locate_file(self, _: str) -> Path:
            return file

    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution())
    with pytest.raises(CapmergeError, match=r"vocabulary\.gz: .*force-reinstall"):
        read_clip_vocabulary()


def test_imports_are_lazy() -> None:
    """Importing the module loads no library, and using it loads neither torch nor clip."""
    script = (
        "import sys; from capmerge.tokens.counter import TokenCounter; "
        "from capmerge.tokens.load import load_clip; "
        "late = ('ftfy', 'regex', 'tokenizers', 'numpy', 'importlib.metadata'); "
        "print([m for m in late if m in sys.modules]); "
        "print(TokenCounter(load_clip('sd1')).count_tokens(['a cat \u2019'] * 9)); "
        "print([m for m in ('clip', 'torch', 'transformers') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.splitlines() == ["[]", str([3] * 9), "[]"]
