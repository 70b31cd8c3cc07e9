"""Files of prompts."""

from pathlib import Path

import huggingface_hub
import pytest

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.prompts import check_apart, read_prompts


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeffa red star\n\n  two   moons \n")
    assert read_prompts(path) == [Condition(None, "a red star"), Condition(None, "two moons")]


def test_further_columns_are_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.jsonl", '{"tag": "counting", "prompt": "two cups", "include": [{"count": 2}]}\n'
    )
    (condition,) = read_prompts(path)
    assert condition == Condition(None, "two cups", {"tag": "counting", "include": [{"count": 2}]})
    assert hash(condition) == hash(Condition(None, "two cups"))  # what it came with may be a list
    path = write(tmp_path, "a.csv", 'says,caption\n"HELLO, YOU","a sign, lit"\nBYE,"two\nlines"\n')
    one, two = read_prompts(path)
    assert (one.text, one.data) == ("a sign, lit", {"says": "HELLO, YOU"})
    assert two.text == "two lines"
    path = write(tmp_path, "b.csv", 'prompt,says\r\na 6" ruler,\r\n\r\n"the ""best"" one","x"')
    assert [each.text for each in read_prompts(path)] == ['a 6" ruler', 'the "best" one']


def test_a_prompt_ends_where_its_line_does(tmp_path: Path) -> None:
    """And not at what else Unicode has of line ends, which a JSON string or a cell may hold."""
    others = "\u2028 \x85 \u2029"
    for name, text in (
        ("a.txt", f"a cat{others} \x0b \x0c on a mat\r\na dog\r\n"),
        ("a.jsonl", f'{{"prompt": "a cat{others}on a mat"}}\n{{"prompt": "a dog"}}'),
        ("a.csv", f'prompt,tag\na cat{others}on a mat,1\n"a\ndog",2\n'),
    ):
        assert [each.text for each in read_prompts(write(tmp_path, name, text))] == [
            "a cat on a mat",
            "a dog",
        ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "", "has no prompts"),
        ("a.txt", "star\nmoon\nstar\n", "line 3: the prompt 'star' stands in line 1 already"),
        ("a.png", "star", r"expected one of \.txt, \.jsonl, \.csv"),
        ("a.jsonl", "star\n", "line 1: not JSON"),
        ("a.jsonl", "[" * 10**5, "line 1: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object, got list"),
        ("a.jsonl", '{"says": "x"}', "no column of prompts; expected one called prompt or text or caption"),
        ("a.jsonl", '{"prompt": 3}', "line 1: expected a prompt, got 3"),
        ("a.csv", "prompt\na, b\n", "more values than columns"),
        ("a.csv", "prompt,says\n,b\n", "expected a prompt, got ''"),
        ("a.csv", "prompt,says\n", "has no prompts"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": "\\ud800 star"}',
            r"line 2: the prompt '\\ud800 star' is no Uni",
        ),
        ("a.csv", 'prompt\na\n"b\nc\nd\n', r"from line 3 on: not CSV \(unexpected end of data\); close each"),
        ("a.csv", 'prompt\n"a"b\n', "from line 2 on: not CSV"),
        ("a.csv", '"prompt\na\n', "from line 1 on: not CSV"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_prompts(write(tmp_path, name, text))


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "b.txt")
    for encoding, byte in (("latin-1", 6), ("utf-16", 1)):
        (tmp_path / "b.txt").write_text("a caf\u00e9\n", encoding=encoding)
        told = f"cannot be read as UTF-8, from byte {byte} on: save it in that encoding"
        with pytest.raises(ConfigError, match=told):
            read_prompts(tmp_path / "b.txt")
    with pytest.raises(ConfigError, match="expected hf://datasets/OWNER/NAME/FILE"):
        read_prompts("hf://datasets/owner/a.txt")

    def fetch(repository: str, name: str, **options: object) -> str:
        assert (repository, name, options["repo_type"]) == ("owner/set", "data/a.txt", "dataset")
        return str(write(tmp_path, "a.txt", "star"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert read_prompts("hf://datasets/owner/set/data/a.txt") == [Condition(None, "star")]

    def fail(*args: object, **options: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError, match=r"cannot be read \(no network\): give the path of a copy"):
        read_prompts("hf://datasets/owner/set/data/a.txt")


def test_trained_and_held_out_prompts_never_mix() -> None:
    one, two, three = (Condition(None, text) for text in "abc")
    check_apart([one], [two, three])
    with pytest.raises(ConfigError, match="1 held-out prompts are trained on as well, such as 'b'"):
        check_apart([one, two], [two, three])
    with pytest.raises(ConfigError, match="such as 'B'"):  # the same to a text encoder
        check_apart([two], [Condition(None, "B")])
