"""`mixflow-fast data scan` as a user meets it."""

from tests.support.command_line import run
from tests.support.image_folders import write_folder


def test_what_is_there_is_printed(tmp_path, capsys):
    images = write_folder(tmp_path / "images")
    code, said, error = run("data", "scan", images, capsys=capsys)
    assert code == 0 and error == "" and "14 in 2 classes (7 to 7 each)" in said
    assert "webp" not in said
    code, said, _ = run("data", "scan", images, "--size", 32, capsys=capsys)
    assert code == 0 and "crop      at 32 px" in said and "\nwebp      about " in said
    assert "\nfree      " in said


def test_bad_images_give_the_exit_code_1(tmp_path, capsys):
    images = write_folder(tmp_path / "images")
    (images / "b/002.JPEG").write_bytes(b"no image")
    code, said, _ = run("data", "scan", images, capsys=capsys)
    assert code == 1
    assert said.endswith(
        "bad       1:\n  b/002.JPEG: its content is no image of a format that is known\n"
    )


def test_wrong_paths_are_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "train/cat").mkdir(parents=True)
    for path, words in (
        ("trian", "did you mean 'train'?"),
        ("train", "'cat' in .* holds no image"),
    ):
        code, said, error = run("data", "scan", tmp_path / path, capsys=capsys)
        assert code == 2 and said == "" and error.count("\n") == 1
        assert words.partition(" in ")[0] in error
    write_folder(tmp_path / "good")
    code, _, error = run("data", "scan", tmp_path / "good", "--size", 0, capsys=capsys)
    assert code == 2 and "--size must be >= 1" in error
