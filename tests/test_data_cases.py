"""Data sets as people have them: each kind is read right, or refused in one line; nothing is left out silently."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT, flags, write_images
from PIL import Image

from commands.predict import find_images
from config import Config
from datasets import build_source, describe_data
from inputs.decode import BadImage, decode
from inputs.folder import FolderIndex
from inputs.formats import HEAD, image_format, readable
from inputs.names import natural, order_of
from inputs.readable import drop_unreadable
from inputs.splits import choose, find_split
from inputs.tar import TarIndex
from inputs.transforms import EvalTransform
from models import checkpoints


def encode(pixels, kind, **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


GREY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
JPEG = encode(COLOUR, "JPEG")


def put(root, **contents):
    """Writes files: put(root, **{"train/a/1.jpg": b"..."})."""
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


# ----------------------------------------------------------------------------------------------------- order of classes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "1", "0"], ["0", "1", "9", "10"]),
        (["class_10", "class_9"], ["class_9", "class_10"]),
        (["b", "a", "B"], ["B", "a", "b"]),
        (["1", "01", "001"], ["001", "01", "1"]),
        (["9" * 5000, "1" + "0" * 5000], ["9" * 5000, "1" + "0" * 5000]),
        (["a-2", "a-10", "a"], ["a", "a-2", "a-10"]),
        (["²", "2"], ["2", "²"]),
    ],
)
def test_numbers_sort_as_numbers(names, expected):
    assert natural(names) == natural(reversed(names)) == expected


def test_padding_with_zeros_does_not_change_the_order():
    rng = random.Random(0)
    for _ in range(50):
        numbers = rng.sample(range(2000), 12)
        plain, padded = [f"x{n}y" for n in numbers], [f"x{n:05d}y" for n in numbers]
        assert [plain.index(name) for name in natural(plain)] == [padded.index(name) for name in sorted(padded)]
    assert sorted(plain) != natural(plain)  # the check can fail


def test_folders_and_tars_have_one_order_and_images_keep_theirs(tmp_path):
    members = [f"{c}/{k}.jpg" for c in range(12) for k in range(2)]
    put(tmp_path, **{f"folder/{name}": JPEG for name in members})
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "folder", ".")
    folder, tar = FolderIndex(tmp_path / "folder"), TarIndex(tmp_path / "all.tar")
    assert folder.classes == tar.classes == [str(k) for k in range(12)]
    assert order_of(folder.classes) == "the order of the numbers in their names"
    for index in (folder, tar):
        for i in range(len(index)):
            assert f"/{index.label(i)}/" in f"/{index.relative(i)}"
    # A run of before is resumed with its images in the same places.
    assert [folder.relative(i) for i in range(len(folder))] == sorted(members)


def test_a_checkpoints_order_decides(tmp_path, main_program, capsys):
    """Weights of a run that sorted 0 1 10 11 2 ...: resumed, fine-tuned and evaluated with their own order."""
    write_images(tmp_path / "data" / "train", [6] * 11)
    write_images(tmp_path / "data" / "val", [2] * 11, seed=1)
    for split in ("train", "val"):
        for k in range(11):
            (tmp_path / "data" / split / f"class_{k}").rename(tmp_path / "data" / split / str(k))
    lexical = sorted(map(str, range(11)))
    settings = {"data_path": tmp_path / "data", "epochs": 1, "output_dir": tmp_path / "run"}
    assert main_program(flags(**settings, stop_after="2 steps")) == 0
    state = checkpoints.load(tmp_path / "run/checkpoint-last.pth")
    assert state["classes"] == list(map(str, range(11)))
    source = build_source(Config(data_path=str(tmp_path / "data")), train=True, classes=lexical)
    assert source.classes == lexical and source.name(source.labels().tolist().index(2)).split("/")[-2] == "10"
    # As an earlier version would have written it.
    del state["format_version"]
    state["classes"] = lexical
    state["identity"]["data"] = {"images": 66, "classes": 11, "fingerprint": "24e1535febe8a928"}
    del state["identity"]["validation"]
    for name in (tmp_path / "run").glob("checkpoint-*.pth"):
        name.unlink()
    checkpoints.save(tmp_path / "run/checkpoint-last.pth", state)
    capsys.readouterr()
    assert main_program(flags(**settings)) == 0
    assert "11 classes in alphabetical order, 10 before 2: 0, 1, ..., 9" in capsys.readouterr().out
    resumed = checkpoints.load(tmp_path / "run/checkpoint-last.pth")
    assert resumed["classes"] == lexical
    tuned = {**settings, "output_dir": tmp_path / "tuned", "finetune": tmp_path / "run/checkpoint-last.pth"}
    assert main_program(flags(**tuned)) == 0
    assert checkpoints.load(tmp_path / "tuned/checkpoint-last.pth")["classes"] == lexical
    capsys.readouterr()
    assert main_program(flags(**settings, eval=True, resume=tmp_path / "run/checkpoint-last.pth")) == 0
    scored = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    log = json.loads((tmp_path / "run/log.txt").read_text().splitlines()[-1])
    assert scored["acc1"] == pytest.approx(log["test_acc1"]) and scored["images"] == 22


# ------------------------------------------------------------------------------------------------------ kinds of images


def test_sixteen_bits_are_their_high_eight():
    deep = GREY.astype(np.uint16) * 256 + 77
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        pixels = decode(encode(deep, kind))
        assert np.array_equal(pixels, decode(encode(GREY, "PNG"))), kind
    swapped = Image.frombytes("I;16B", (30, 20), deep.astype(">u2").tobytes())
    assert np.array_equal(decode(encode(swapped, "TIFF"))[..., 1], GREY)


def test_floats_and_wide_integers_are_scaled():
    unit = GREY.astype(np.float32) / 255
    assert np.array_equal(decode(encode(unit, "TIFF"))[..., 0], GREY)
    full = GREY.copy()
    full[0, :2] = 0, 255
    for scaled in (full.astype(np.float32) * 40 - 3000, full.astype(np.int32) * 100_000 + 5):
        assert np.array_equal(decode(encode(scaled, "TIFF"))[..., 2], full)  # from the image's own range
    declared = decode(encode(GREY.astype(np.uint16) * 4, "TIFF", tiffinfo={281: 1020}))
    assert np.array_equal(declared[..., 0], GREY)
    assert not decode(encode(np.full((4, 4), 7.0, np.float32), "TIFF")).any()
    bad = unit.copy()
    bad[3, 4] = np.nan
    with pytest.raises(BadImage, match="not finite"):
        decode(encode(bad, "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_pils(mode):
    image = COLOUR.convert("RGB").convert("RGBA").convert("LA") if mode in ("LA", "PA") else COLOUR
    if mode == "LAB":
        from PIL import ImageCms

        rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(COLOUR, ImageCms.buildTransform(rgb, lab, "RGB", "LAB"))
    elif mode != "LA":
        image = image.convert(mode)
    from inputs.decode import image_pixels

    assert np.array_equal(image_pixels(image), np.array(image.convert("RGB")))


FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG2000", "BMP", "PPM", "AVIF", "JXL", "QOI"]


@pytest.mark.parametrize("kind", FORMATS)
def test_content_decides(tmp_path, kind):
    if kind not in readable():
        pytest.skip(f"{kind} is not readable here")
    content = encode(COLOUR, kind)
    assert image_format(content[:HEAD]) == kind
    put(tmp_path, **{f"a/1{ending}": content for ending in (".jpg", ".weird", ".TXT", "")}, **{"a/2.txt": b"BM no"})
    index = FolderIndex(tmp_path)
    assert len(index) == 4 and index.contents()[1] == {".txt": 1}
    assert all(decode(index.read(i)).shape == (20, 30, 3) for i in range(4))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
    tar = TarIndex(tmp_path / "a.tar")
    assert len(tar) == 4 and tar.contents()[1] == {".txt": 1}


def test_predict_takes_images_by_their_content(tmp_path, capsys):
    put(tmp_path, **{"a.weird": JPEG, "deep/b.JPG": JPEG, "c.txt": b"text", ".d.jpg": JPEG})
    os.mkfifo(tmp_path / "e.jpg")
    assert find_images(str(tmp_path)) == [str(tmp_path / "a.weird"), str(tmp_path / "deep/b.JPG")]
    line = capsys.readouterr().err
    assert "1 .txt" in line and "1 .jpg" in line
    put(tmp_path, **{"data/a/1.jpg": JPEG})
    os.mkfifo(tmp_path / "data/a/2.jpg")
    assert len(FolderIndex(tmp_path / "data")) == 1  # nor does a run wait for one


def test_text_is_no_image():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("BMP123456GIFRS \n;,.JjP") for _ in range(HEAD)).encode()
        assert image_format(text) in (None, "PPM")
    for content in (b"", b"B", b"BM", b"P6", b"\xff\xd8", b"RIFF....WAVEfmt ", b"PK\x03\x04" + bytes(28)):
        assert image_format(content) is None


def test_formats_that_nothing_here_reads_are_named(tmp_path, monkeypatch):
    head = b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)
    put(tmp_path, **{"a/1.jpg": JPEG, "a/2.jxl": head, "a/3.heic": b"\0\0\0\x18ftypheic" + bytes(40)})
    without = frozenset(readable() - {"JXL", "HEIF"})
    with monkeypatch.context() as patch:
        for module in ("folder", "members", "tar"):
            patch.setattr(f"inputs.{module}.readable", lambda: without)
        left_out = FolderIndex(tmp_path).contents()[1]
    assert left_out == {
        ".jxl (JPEG XL: pip install pillow-jxl-plugin)": 1,
        ".heic (HEIF: pip install pillow-heif)": 1,
    }
    if "JXL" in readable():  # installed since: the index is made anew
        assert len(FolderIndex(tmp_path)) > 1


def test_what_lies_beside_and_what_is_no_file_is_counted(tmp_path):
    put(
        tmp_path, **{"a/1.jpg": JPEG, "README": b"text", "loose.jpg": JPEG, "a/x.csv": b"1", "__MACOSX/a/._1.jpg": b"x"}
    )
    (tmp_path / "a/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    index = FolderIndex(tmp_path)
    assert len(index) == 1 and index.classes == ["a"]
    assert index.contents()[1] == {
        ".csv": 1,
        "broken link": 1,
        ".jpg beside the class folders": 1,
        "no ending beside the class folders": 1,
    }


def test_thin_images_equal_the_whole_resized(monkeypatch):
    rng = np.random.default_rng(0)
    for shape in ((30, 170), (170, 30), (400, 1700), (900, 90), (2, 400), (400, 1), (700, 150)):
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        transform = EvalTransform(96, 64, "lanczos")
        with monkeypatch.context() as patch:
            patch.setattr("inputs.transforms.THIN", 1e9)
            whole = transform(image).float()
        difference = (transform(image).float() - whole).abs()
        assert difference.max() <= 2 and difference.mean() < 0.05, shape
    assert (transform(image.rotate(180)).float() - whole).abs().mean() > 1  # the check can fail


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux")
def test_thin_and_huge_images_take_little_memory():
    code = """
import io, resource
import numpy as np
from PIL import Image
from inputs.transforms import EvalTransform
from models import checkpoints
def content(height, width):
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()
transform = EvalTransform(224, 224, "lanczos")
transform(content(400, 600))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shape in ((1, 20000), (30000, 1), (65000, 1), (3, 50000)):
    assert transform(content(*shape)).shape == (3, 224, 224)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000, "KB more than an ordinary image"


# --------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train", "val"], "train", "val"),
        (["Training", "Testing"], "Training", "Testing"),
        (["TRAIN", "Valid", "test"], "TRAIN", "Valid"),
        (["seg_train", "seg_test", "seg_pred"], "seg_train", "seg_test"),
        (["Train Set", "Validation-set"], "Train Set", "Validation-set"),
        (["train", "validation", "test"], "train", "validation"),
        (["cat", "dog"], None, None),
        (["trained", "evaluate", "retest"], None, None),
    ],
)
def test_usual_names(names, train, val):
    assert (choose(names, "train", "train"), choose(names, "val", "val")) == (train, val)


def test_a_name_that_is_given_is_taken_in_any_case_and_nothing_else_for_it():
    assert choose(["Abc", "train"], "abc", "train") == "Abc"
    assert choose(["train", "val"], "training", "train") is None
    with pytest.raises(ValueError, match="test_a and test_b"):
        choose(["test_a", "test_b"], "val", "val")


@pytest.mark.parametrize(
    "prefix", ["", "archive/", "a/b/", "ILSVRC/Data/CLS-LOC/"], ids=["root", "wrapped", "twice", "kaggle"]
)
@pytest.mark.parametrize("doubled", [False, True])
def test_splits_are_found_in_folders_in_folders(tmp_path, prefix, doubled):
    for split in ("Train", "Test"):
        inner = f"{prefix}{split}/{split if doubled else ''}"
        put(tmp_path, **{f"{inner}/{c}/{k}.jpg": JPEG for c in "ab" for k in range(2)})
    if prefix.startswith("ILSVRC"):
        (tmp_path / "ILSVRC/ImageSets").mkdir()
    config = Config(data_path=str(tmp_path))
    train, val = (build_source(config, train=part) for part in (True, False))
    assert train.classes == val.classes == ["a", "b"] and "Train/" in train.name(0) and "Test/" in val.name(0)
    assert "4 .jpg" in describe_data(config, (train, val))[0]


def test_class_folders_of_folders_are_refused(tmp_path):
    put(tmp_path, **{f"{s}/{c}/1.jpg": JPEG for s in ("Training", "Testing") for c in "ab"})
    with pytest.raises(ValueError, match=r"2 class folders .* folders: Testing, Training .*--train_split Training"):
        FolderIndex(tmp_path)
    put(tmp_path, **{"Testing/1.jpg": JPEG, "Training/1.jpg": JPEG})  # an image of each: then they are classes
    assert FolderIndex(tmp_path).labels().tolist() == [0, 0, 0, 1, 1, 1]


def test_no_split_names_what_is_there(tmp_path):
    put(tmp_path, **{"cat/1.jpg": JPEG, "dog/1.jpg": JPEG})
    with pytest.raises(ValueError, match=r"no folder .*/train nor .*folders there: cat, dog: .*--train_split \('\.'"):
        build_source(Config(data_path=str(tmp_path)), train=True)
    with pytest.raises(ValueError, match=r"no folder .*/val .*--val_share 10%"):
        build_source(Config(data_path=str(tmp_path), train_split="."), train=False)
    with pytest.raises(ValueError, match="there is no folder"):
        find_split(tmp_path / "none", "train", "train")


# ------------------------------------------------------------------------------------ validation images; the first line


def test_unreadable_validation_images_are_found_first_and_at_once(tmp_path, main_program, capsys):
    write_images(tmp_path / "train", [10, 10])
    write_images(tmp_path / "val", [6, 6], seed=1)
    bad = [tmp_path / "val/class_0/01.jpg", tmp_path / "val/class_1/03.jpg"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:-200])  # its header is good
    settings = {"data_path": tmp_path, "epochs": 1}
    assert main_program(flags(**settings, output_dir=tmp_path / "none", max_bad=0)) == 2
    err = capsys.readouterr().err
    assert all(str(path) in err for path in bad) and "allows 0" in err and not (tmp_path / "none").exists()
    assert main_program(flags(**settings, output_dir=tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert out.index(str(bad[1])) < out.index("evaluation at") and "on 10 images (2 more cannot be used)" in out
    record = json.loads((tmp_path / "run/log.txt").read_text().splitlines()[-1])
    assert (record["eval_images"], record["eval_bad_images"]) == (10, 2)
    weights = tmp_path / "run/checkpoint-last.pth"
    assert main_program(flags(**settings, eval=True, resume=weights)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["bad_images"] == 2 and str(bad[0]) in err and "not those" not in err
    for path in bad:  # mended in place: noticed at the next start
        path.write_bytes((tmp_path / "val/class_1/00.jpg").read_bytes())
    assert main_program(flags(**settings, eval=True, resume=weights)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["images"] == 12 and "10 then, 12 now" in err


def test_the_check_is_remembered(tmp_path, monkeypatch):
    write_images(tmp_path, [6, 6])
    (tmp_path / "class_0/01.jpg").write_bytes(b"")
    looked = []
    original = __import__("inputs.readable", fromlist=["_try"])._try
    monkeypatch.setattr("inputs.readable._try", lambda data: looked.append(1) or original(data))
    for times in (12 + 1, 1):  # all, then the bad one alone
        looked.clear()
        kept = drop_unreadable(FolderIndex(tmp_path), 0.001)
        assert len(kept) == 11 and len(kept.dropped) == 1 and len(looked) == times
    (tmp_path / "class_1/05.jpg").write_bytes(b"new, and bad")
    assert len(drop_unreadable(FolderIndex(tmp_path), 0.001)) == 10


def test_evaluation_says_when_the_images_differ(tmp_path, main_program, capsys):
    write_images(tmp_path / "data", [40, 40])
    settings = {"data_path": tmp_path / "data", "train_split": ".", "val_share": "20%", "epochs": 1}
    assert main_program(flags(**settings, output_dir=tmp_path / "run")) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert "held out by a hash of their paths, --val_share 20%" in line and "80 .jpg" in line
    whole = build_source(Config(data_path=str(tmp_path / "data"), train_split=".", val_share="20%"), train=False)
    weights = {"resume": tmp_path / "run/checkpoint-last.pth", "eval": True}
    assert main_program(flags(**settings, **weights)) == 0 and "not those" not in capsys.readouterr().err
    held = [whole.name(i) for i in range(len(whole))]
    trained = next(path for path in sorted((tmp_path / "data").rglob("*.jpg")) if str(path) not in held)
    trained.unlink()
    assert main_program(flags(**settings, **weights)) == 0 and "not those" not in capsys.readouterr().err
    (tmp_path / "data" / held[0]).unlink()
    assert main_program(flags(**settings, **weights)) == 0
    assert f"{len(held)} then, {len(held) - 1} now" in capsys.readouterr().err


def test_the_first_line_is_true(tmp_path):
    put(tmp_path, **{f"train/{c}/{k}.jpg": JPEG for c in ("2", "10") for k in range(3)})
    put(tmp_path, **{"train/2/a.png": encode(GREY.astype(np.uint16), "PNG"), "train/2/notes.txt": b"x"})
    put(tmp_path, **{"train/10/t.png": encode(COLOUR.convert("RGBA"), "PNG"), "val/2/1.jfif": JPEG})
    frames = [Image.new("RGB", (9, 9), (90 * k, 0, 0)) for k in range(3)]
    put(tmp_path, **{"train/10/m.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:])})
    config = Config(data_path=str(tmp_path))
    (line,) = describe_data(config, tuple(build_source(config, train=part) for part in (True, False)))
    for words in (
        "9 training and 1 validation images (--val_split val)",
        "2 classes in the order of the numbers in their names: 2, 10",
        "1 of them without a validation image: 10",
        "train: 6 .jpg, 2 .png, 1 .gif; not read: 1 .txt",
        "val: 1 .jfif",
        "1 of 9 training images looked at are 16-bit grey",
        "1 of 9 training images looked at are transparent",
        "1 of 9 training images looked at are animated",
    ):
        assert words in line, line
    assert "\n" not in line


# ----------------------------------------------------------------------------------------------------------------- fuzz


def test_any_tree_is_read_as_pillow_says(tmp_path):
    """Random names, endings, formats, modes and depth: what Pillow opens is an image, all else is counted."""
    rng = random.Random(0)
    kinds = [kind for kind in FORMATS if kind in readable()]
    for tree in range(12):
        root = tmp_path / str(tree)
        images, others = set(), 0
        for _ in range(40):
            label, depth = rng.choice(["a b", "ü", "10", "9"]), rng.randint(0, 2)
            folder = "/".join([label, *(rng.choice(["x", "y.jpg"]) for _ in range(depth))])
            base, end = rng.choice(["k", "a.b", "ß"]), rng.choice([".jpg", ".dat", "", ".TXT"])
            name = f"{folder}/{base}{rng.randrange(10**6)}{end}"
            kind, size = rng.choice(kinds), (rng.randint(1, 40), rng.randint(1, 40))
            image = COLOUR.convert("RGB" if kind == "QOI" else rng.choice(["RGB", "L"])).resize(size)
            content = encode(image, kind) if rng.random() < 0.7 else rng.randbytes(50)
            taken = image_format(content[:HEAD]) is not None or name.endswith(".jpg")
            put(root, **{name: content})
            images |= {name} if taken else set()
            others += not taken
        put(root, **{f"{label}/0.jpg": JPEG for label in ("a b", "ü", "10", "9")})
        images |= {f"{label}/0.jpg" for label in ("a b", "ü", "10", "9")}
        index = FolderIndex(root)
        found = {index.relative(i): index.label(i) for i in range(len(index))}
        assert found.keys() == images and index.classes == ["9", "10", "a b", "ü"]
        assert all(index.classes[label] == name.split("/")[0] for name, label in found.items())
        endings, left_out = index.contents()
        assert sum(endings.values()) == len(images) and sum(left_out.values()) == others
        for i in range(len(index)):
            data = index.read(i)
            if image_format(data[:HEAD]):
                with Image.open(io.BytesIO(data)) as image:
                    assert decode(data).shape == (image.height, image.width, 3)
