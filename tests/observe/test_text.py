import importlib.util

import pytest
import torch

from pliant.errors import PliantError
from pliant.measure import load_text, split, windows


class Bytes:
    """A tokenizer of one token a byte; counts special tokens when asked to add them."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": ([1] if add_special_tokens else []) + list(text.encode())}


def test_windows_follow_each_other_without_special_tokens():
    text = "abcdefghijk"
    found = windows(text, Bytes(), 4)
    assert found.shape == (2, 4)
    assert bytes(found.flatten().tolist()).decode() == "abcdefgh"
    assert torch.equal(windows(text, Bytes(), 4, limit=1), found[:1])


def test_text_too_short_or_empty_is_named():
    with pytest.raises(PliantError, match="3 tokens, fewer than a window of 4"):
        windows("abc", Bytes(), 4)
    with pytest.raises(PliantError, match="empty"):
        windows("  \n", Bytes(), 4)
    with pytest.raises(PliantError, match="at least 2"):
        windows("abc", Bytes(), 1)
    with pytest.raises(PliantError, match="at least one window"):
        windows("abcdefgh", Bytes(), 4, limit=0)


def test_the_parts_of_a_text_do_not_meet():
    text = "".join(chr(33 + i % 90) for i in range(1000))
    evaluation, calibration = split(text, "evaluation"), split(text, "calibration")
    assert text.startswith(evaluation)
    assert len(evaluation) == 600
    assert text.endswith(calibration)
    assert len(calibration) == 300
    with pytest.raises(PliantError, match="not 'training'"):
        split(text, "training")


def test_files_are_read_and_bad_ones_named(tmp_path):
    good, empty, binary = tmp_path / "good.txt", tmp_path / "empty.txt", tmp_path / "binary"
    good.write_text("Grüße\n", encoding="utf-8")
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert load_text(good) == "Grüße\n"
    for path, words in ((empty, "holds no text"), (binary, "UTF-8"), (tmp_path, "a directory")):
        with pytest.raises(PliantError, match=words):
            load_text(path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is here")
def test_a_dataset_without_its_library_says_what_to_install():
    with pytest.raises(PliantError, match="pip install datasets"):
        load_text("wikitext:wikitext-2-raw-v1:test")


def test_a_dataset_is_read_by_name_config_and_split(monkeypatch):
    class Rows(dict):
        column_names = ("id", "text")

        def __len__(self):
            return 2

        def __getitem__(self, at):
            return {"id": 0, "text": "one"} if at == 0 else ["one", "two"]

    class Library:
        @staticmethod
        def load_dataset(path, config, split):
            assert (path, config, split) == ("owner/name", "plain", "validation")
            return Rows()

    monkeypatch.setitem(__import__("sys").modules, "datasets", Library)
    assert load_text("owner/name:plain:validation") == "one\ntwo"
