"""Labels that lie beside the images: in tables of every kind, in ImageNet's lists, in the side files of tar shards."""

import csv
import io
import json
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
from conftest import flags, write_images
from PIL import Image

from config import Config
from datasets import build_source, describe_data
from inputs.folder import FolderIndex
from inputs.imagenet import validation_labels
from inputs.labelled import Labelled
from inputs.members import key_of, label_text, scan
from inputs.shards import LocalShards
from inputs.tables import read_table
from inputs.tar import TarIndex
from inputs.views import hold_out, in_order, map_classes


def jpeg(k=0):
    file = io.BytesIO()
    Image.new("RGB", (8 + k % 5, 8), (k % 256, 100, 200)).save(file, "JPEG")
    return file.getvalue()


def put(root, *names):
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(k))


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):  # (type, target) of a link
                info.type, info.linkname = data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def write(path, rows, columns=("path", "label", "split")):
    """A table of dictionaries or tuples, of the kind that the ending says."""
    rows = [dict(zip(columns, row)) for row in rows]
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def labels_of(source):
    return {source.name(i).split("/")[-1]: source.classes[source.label(i)] for i in range(len(source))}


KINDS = ["csv", "tsv", "jsonl", "json", "parquet"]
ROWS = [
    ("a.jpg", "cat", "train"),
    ("deep/b.jpg", "dog, small", "train"),
    ("ü c.jpg", "cat", "val"),
    ("d.jpg", "dog, small", "val"),
]


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_with_splits(tmp_path, kind):
    put(tmp_path, *(row[0] for row in ROWS), "unnamed.jpg")
    table = write(tmp_path / f"labels.{kind}", [*ROWS, ("gone.jpg", "cat", "train")])
    config = Config(data_path=str(tmp_path), labels=table)
    train, val = sources = [build_source(config, train=part) for part in (True, False)]
    assert train.classes == val.classes == ["cat", "dog, small"]
    assert labels_of(train) == {"a.jpg": "cat", "b.jpg": "dog, small"}
    assert labels_of(val) == {"ü c.jpg": "cat", "d.jpg": "dog, small"}
    for source in sources:
        assert source.labels().tolist() == [source.label(i) for i in range(len(source))]
        assert pickle.loads(pickle.dumps(source)).read(1) == source.read(1)
    (line,) = describe_data(config, (train, val))
    assert "2 training and 2 validation images" in line and "1 rows without an image, 3 images below" in line


@pytest.mark.parametrize("how", ["below data_path", "below the split", "name", "no ending", "absolute", "windows"])
def test_ways_to_write_a_path(tmp_path, how):
    put(tmp_path, "Train/x/1.5.jpg", "Train/y/2.jpg", "Test/x/3.jpg")
    change = {
        "below data_path": lambda path: f"./{path}",
        "below the split": lambda path: path.split("/", 1)[1],
        "name": lambda path: path.rsplit("/", 1)[1],
        "no ending": lambda path: path.rsplit("/", 1)[1].rsplit(".", 1)[0],
        "absolute": lambda path: str(tmp_path / path),
        "windows": lambda path: path.replace("/", "\\"),
    }[how]
    rows = [("Train/x/1.5.jpg", 7), ("Train/y/2.jpg", 10), ("Test/x/3.jpg", 10)]
    table = write(tmp_path / "labels.csv", [(change(path), label) for path, label in rows], ("Image_ID", "Class"))
    config = Config(data_path=str(tmp_path), labels=table)
    train, val = (build_source(config, train=part) for part in (True, False))
    assert train.classes == val.classes == ["7", "10"]
    assert labels_of(train) == {"1.5.jpg": "7", "2.jpg": "10"} and labels_of(val) == {"3.jpg": "10"}


def test_columns_by_name_without_a_header_and_with_semicolons(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "x.csv").write_text("path,where,what\nno,a.jpg,1\nno,b.jpg,2\n")
    (tmp_path / "y.csv").write_text("a.jpg,1\nb.jpg,2\n")
    (tmp_path / "z.csv").write_text("\ufefffile;label;note\na.jpg;1;x,y\nb.jpg;2;\n")
    (tmp_path / "map.json").write_text('{"a.jpg": 1, "b.jpg": 2.0}')
    columns = {"x.csv": ["where", "what"]}
    for name in ("x.csv", "y.csv", "z.csv", "map.json"):
        table = read_table(tmp_path / name, columns.get(name))
        assert labels_of(Labelled(FolderIndex(tmp_path, flat=True), table)) == {"a.jpg": "1", "b.jpg": "2"}, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\n", "has no labels"),
        ("path,label\na.jpg,\n", "has no labels"),
        ("path,kind\na.jpg,1\n", r"none of its columns \(path, kind\).*label.*--label_columns"),
        ("path,label\n,1\n", "row 1 has no path"),
        ("path,label\nx.jpg,1\n", "none of its 1 rows names one of the 3 images.*x.jpg.*a.jpg"),
        ("path,label\na.jpg,1\na.jpg,2\n", "1 images have rows with different labels.*a.jpg: 1 and 2"),
        ("path,label\nc.jpg,1\n", "fits several images, x/c.jpg and y/c.jpg"),
    ],
)
def test_tables_that_cannot_be_right(tmp_path, content, message):
    put(tmp_path / "data", "a.jpg", "x/c.jpg", "y/c.jpg")
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(ValueError, match=f"--labels .*{message}"):
        Labelled(FolderIndex(tmp_path / "data", flat=True), read_table(tmp_path / "labels.csv"))


def test_more_that_is_refused(tmp_path):
    put(tmp_path, "a.jpg")
    for name, content, message in (
        ("gone.csv", None, "No such file"),
        ("x.xlsx", "", "its ending must be"),
        ("x.json", "{", "cannot be read"),
        ("x.jsonl", "3\n", "no row with a path"),
        ("y.jsonl", '{"path": "a.jpg", "label": 1.5}\n', "row 1 has label 1.5"),
        ("z.jsonl", '{"path": "a.jpg", "label": ["x", "y"]}\n', "has 2 labels.*--task multilabel"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    if pytest.importorskip("pyarrow"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_table(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("path,label,split\na.jpg,1,seven\n")
    with pytest.raises(ValueError, match=r"none of its splits \(seven\) is train.*--train_split"):
        build_source(Config(data_path=str(tmp_path), labels=str(tmp_path / "x.csv")), train=True)
    (tmp_path / "y.csv").write_text("path,label\na.jpg,1\n")
    with pytest.raises(ValueError, match="no column kind; it has path, label"):
        read_table(tmp_path / "y.csv", ["path", "kind"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label_columns": "[a,b]"}, "--labels"),
        ({"labels": "x.csv", "data_set": "cifar10"}, "--labels is for"),
        ({"labels": "x.csv", "label_columns": "[a]"}, "[path, label]"),
        ({"val_share": "110%"}, "--val_share is 110%"),
        ({"val_share": "x"}, "--val_share is x"),
        ({"val_share": 0.1, "val_per_class": 3}, "give one of them"),
    ],
)
def test_settings_that_contradict_each_other(main_program, tmp_path, folder, capsys, settings, words):
    assert main_program(flags(**{"data_path": folder, "output_dir": tmp_path, **settings})) == 2
    assert words in capsys.readouterr().err


def test_training_with_a_table(train, tmp_path):
    """One flat folder and a table, held out by a share; the labels are those of the same images in class folders."""
    write_images(tmp_path / "by class", [30, 30])
    rows = []
    for path in sorted((tmp_path / "by class").rglob("*.jpg")):
        target = tmp_path / "flat" / f"{path.parent.name}-{path.name}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
        rows.append((target.name, path.parent.name))
    table = write(tmp_path / "labels.csv", rows, ("path", "label"))
    settings = {"epochs": 1, "val_share": "20%"}
    run = train("flat-run", data_path=tmp_path / "flat", labels=table, **settings)
    assert run.state()["classes"] == ["class_0", "class_1"]
    held = run.log()[-1]["eval_images"]
    assert 3 <= held <= 25
    source = build_source(Config(data_path=str(tmp_path / "flat"), labels=table, val_share=0.2), train=True)
    assert len(source) == 60 - held and all(source.classes[source.label(i)] in source.name(i) for i in range(60 - held))


@pytest.mark.parametrize("way", ["separator", "rows", "list", "json text"])
def test_several_labels(tmp_path, way):
    """The interface of a multi-label task: a tuple of class numbers per image, a table of them all."""
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    expected = {"a.jpg": ["cat", "dog"], "b.jpg": ["dog"], "c.jpg": []}
    rows, kind, separator = list(expected.items()), ".jsonl", None
    if way == "separator":
        rows, kind, separator = [(path, " | ".join(names)) for path, names in rows], ".csv", "|"
    elif way == "rows":
        rows, kind = [("a.jpg", "dog"), ("b.jpg", "dog"), ("a.jpg", "cat"), ("a.jpg", "cat"), ("c.jpg", "")], ".csv"
    elif way == "json text":
        rows, kind = [(path, json.dumps(names)) for path, names in rows], ".csv"
    table = read_table(write(tmp_path / f"x{kind}", rows, ("path", "label")), None, separator, several=True)
    source = Labelled(FolderIndex(tmp_path, flat=True), table, several=True)
    assert source.several and source.classes == ["cat", "dog"]
    assert [source.label(i) for i in range(3)] == [(0, 1), (1,), ()]
    assert source.labels().tolist() == [[True, True], [False, True], [False, False]]
    turned = in_order(source, ["dog", "cat"])
    assert turned.several and [turned.label(i) for i in range(3)] == [(0, 1), (0,), ()]
    assert turned.labels().tolist() == [[True, True], [True, False], [False, False]]
    (tmp_path / "map.txt").write_text("cat\tbeast\n")
    mapped = map_classes(source, tmp_path / "map.txt")
    assert len(mapped) == 1 and mapped.label(0) == (0,) and mapped.labels().tolist() == [[True]]


def test_several_labels_held_out(tmp_path):
    put(tmp_path, *(f"{k}.jpg" for k in range(60)))
    rows = [(f"{k}.jpg", ["a"] if k % 2 else ["a", "b"]) for k in range(60)]
    table = read_table(write(tmp_path / "x.json", rows, ("path", "label")), several=True)
    train, val, none = hold_out(Labelled(FolderIndex(tmp_path, flat=True), table, several=True), share=0.3)
    assert not none and len(train) + len(val) == 60 and 8 < len(val) < 30 and val.labels().shape == (len(val), 2)


# ------------------------------------------------------------------------------------------------------------ ImageNet


WNIDS = {1: "n02119789", 2: "n02100735", 3: "n02110185"}


@pytest.mark.parametrize("edition", ["kaggle", "devkit", "devkit text"])
def test_imagenets_flat_validation_folder(tmp_path, edition, main_program, capsys):
    put(tmp_path, *(f"data/train/{wnid}/{wnid}_{k}.JPEG" for wnid in WNIDS.values() for k in range(4)))
    put(tmp_path, *(f"data/val/ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, 7)))
    truth = [3, 1, 2, 2, 1, 3]
    if edition == "kaggle":
        rows = [(f"ILSVRC2012_val_{k:08d}", f"{WNIDS[n]} 1 2 3 4 ") for k, n in enumerate(truth, 1)]
        random.Random(0).shuffle(rows)
        write(tmp_path / "LOC_val_solution.csv", rows, ("ImageId", "PredictionString"))
    else:
        devkit = tmp_path / "data/ILSVRC2012_devkit_t12/data"
        devkit.mkdir(parents=True)
        (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, truth)) + "\n")
        if edition == "devkit":
            from scipy.io import savemat

            synsets = np.zeros(3, dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
            for row, (number, wnid) in zip(synsets, WNIDS.items()):
                row["ILSVRC2012_ID"], row["WNID"] = number, wnid
            savemat(devkit / "meta.mat", {"synsets": synsets})
        else:
            (devkit / "map_clsloc.txt").write_text("".join(f"{wnid} {n} name\n" for n, wnid in WNIDS.items()))
    config = Config(data_path=str(tmp_path / "data"))
    train, val = (build_source(config, train=part) for part in (True, False))
    assert train.classes == val.classes == sorted(WNIDS.values()) and len(train) == 12
    assert labels_of(val) == {f"ILSVRC2012_val_{k:08d}.JPEG": WNIDS[n] for k, n in enumerate(truth, 1)}


def test_imagenets_validation_folder_without_a_list(tmp_path):
    put(tmp_path, "train/n01440764/1.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv .* nor ILSVRC2012_devkit_t12 .*--labels"):
        build_source(Config(data_path=str(tmp_path)), train=False)
    (tmp_path / "LOC_val_solution.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not Kaggle's list"):
        build_source(Config(data_path=str(tmp_path)), train=False)
    put(tmp_path, "other/1.jpg")
    assert validation_labels(tmp_path / "other") is None


# ---------------------------------------------------------------------------------------------------------- tar shards


def shard(path, kind, numbers, image=".jpg", folder=""):
    """Samples whose label is in a side file of this kind."""
    members = []
    for k in numbers:
        side = {
            ".cls": str(k % 12).encode(),
            ".txt": f"{k % 12}\n".encode(),
            ".json": json.dumps({"label": k % 12, "caption": f"picture {k}"}).encode(),
            ".jsonkey": json.dumps({"label": "wrong", "target": f"{k % 12}", "x": None}).encode(),
        }[kind]
        members += [(f"{folder}{k:05d}{image}", jpeg(k)), (f"{folder}{k:05d}{kind.removesuffix('key')}", side)]
    random.Random(len(members)).shuffle(members)
    return pack(path, members)


@pytest.mark.parametrize("folder", ["", "./", "train/"])
@pytest.mark.parametrize("image", [".jpg", ".input.JPG", ".png"])
@pytest.mark.parametrize("kind", [".cls", ".txt", ".json", ".jsonkey"])
def test_labels_in_side_files(tmp_path, kind, image, folder):
    for k in range(2):
        shard(tmp_path / f"{k:06d}.tar", kind, range(40 * k, 40 * k + 40), image, folder)
    index = TarIndex(tmp_path, label_key="target" if kind == ".jsonkey" else "label")
    assert index.classes == [str(k) for k in range(12)] and len(index) == 80
    for i in range(80):
        number = int(index.relative(i).split("/")[-1][:5])
        assert index.classes[index.label(i)] == str(number % 12) and index.read(i) == jpeg(number)
    assert index.labels().tolist() == [index.label(i) for i in range(80)]


def captions(path, more=()):
    """A shard as img2dataset writes it: image, caption, metadata."""
    members = []
    for k in range(12):
        meta = json.dumps({"url": "u", "caption": f"a picture {k}", "key": f"{k:09d}", "width": 8, **dict(more)})
        members += [(f"{k:09d}.jpg", jpeg(k)), (f"{k:09d}.txt", b"a picture"), (f"{k:09d}.json", meta.encode())]
    return pack(path, members)


def test_img2dataset(tmp_path):
    captions(tmp_path / "00000.tar")
    (tmp_path / "00000.parquet").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"side files of 12 of 12 images state no label.*00000\.tar.*\.json.*--label_key"
    ):
        TarIndex(tmp_path)
    with pytest.raises(ValueError, match=r"keys in its \.json files: caption key url width"):
        TarIndex(tmp_path)
    rows = [(f"{k:09d}", "cat" if k % 2 else "dog") for k in range(12)]
    table = write(tmp_path / "labels.csv", rows, ("key", "label"))
    config = Config(data_path=str(tmp_path), data_set="tar", labels=table, train_split=".", val_share=0.3)
    train, val = (build_source(config, train=part) for part in (True, False))
    assert train.classes == ["cat", "dog"] and len(train) + len(val) == 12
    captions(tmp_path / "00000.tar", {"species": "emu"}.items())
    assert TarIndex(tmp_path, label_key="species").classes == ["emu"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([(f"{k}{e}", b"\0") for k in range(3) for e in (".npy", ".jpg")], r"state no label.*0\.jpg with \.npy"),
        ([(f"{k}.jpg", b"") for k in range(3)] + [("0.cls", b"1")], "archive|no side file"),
        ([(f"{k}.jpg", b"") for k in range(3)], "numbered shards"),
        (
            [(f"{k}{e}", f"text {k}".encode()) for k in range(9) for e in (".txt", ".jpg")],
            "captions rather than labels",
        ),
        ([("1.jpg", b""), ("1.json", b"{")], r"side file \.json cannot be read"),
        ([("1.jpg", b""), ("1.json", b'{"label": null}')], "state no label"),
        ([("1.jpg", b""), ("1.json", b"[" * 100_000)], r"side file \.json cannot be read"),
        ([("a/1.jpg", b""), ("b/2.jpg", b""), ("b/2.cls", b"x")], "no side file that states a label"),
        ([("1.jpg", b""), ("1.json", b'{"label": [1, 2]}')], "several labels"),
    ],
)
def test_shards_that_state_no_label_are_refused(tmp_path, members, message):
    pack(tmp_path / "data-00000.tar", members)
    with pytest.raises(ValueError, match=f"--data_path.*{message}") as caught:
        TarIndex(tmp_path)
    assert "\n" not in str(caught.value)


def test_archives_that_are_classes_are_not_taken_for_shards(tmp_path):
    for name in ("n01440764.tar", "n01443537.tar", "n01484850.tar"):
        pack(tmp_path / name, [("1.jpg", b"")])
    assert TarIndex(tmp_path).classes == ["n01440764", "n01443537", "n01484850"]


def test_several_labels_in_shards(tmp_path):
    sides = [{"label": ["b", "a"]}, {"label": "a"}, {"label": []}]
    members = [(f"{k}.jpg", jpeg(k)) for k in range(3)] + [
        (f"{k}.json", json.dumps(s).encode()) for k, s in enumerate(sides)
    ]
    pack(tmp_path / "000.tar", members)
    index = TarIndex(tmp_path, several=True)
    assert [index.label(i) for i in range(3)] == [(0, 1), (0,), ()]
    assert index.labels().tolist() == [[True, True], [True, False], [False, False]]


@pytest.mark.parametrize("folder", ["", "a/b/"])
def test_links_inside_archives(tmp_path, folder):
    """Hard links, as tar makes them of files with two names, and symbolic ones, before and behind what they name."""
    members = [
        (f"{folder}2.cls", (tarfile.LNKTYPE, f"{folder}1.cls")),
        (f"{folder}3.jpg", (tarfile.SYMTYPE, "1.jpg")),
        (f"{folder}1.jpg", jpeg(1)),
        (f"{folder}1.cls", b"cat"),
        (f"{folder}2.jpg", (tarfile.LNKTYPE, f"{folder}3.jpg")),  # of a link
        (f"{folder}3.cls", b"dog"),
        (f"{folder}4.jpg", (tarfile.SYMTYPE, "/outside/5.jpg")),
    ]
    pack(tmp_path / "x.tar", members)
    index = TarIndex(tmp_path)
    found = {index.relative(i)[-5:]: (index.classes[index.label(i)], index.read(i)) for i in range(len(index))}
    assert found == {"1.jpg": ("cat", jpeg(1)), "2.jpg": ("cat", jpeg(1)), "3.jpg": ("dog", jpeg(1))}
    assert index.contents()[1] == {"broken link": 1}
    put(tmp_path / "real", "a/1.jpg")
    (tmp_path / "real/a/2.jpg").hardlink_to(tmp_path / "real/a/1.jpg")
    with tarfile.open(tmp_path / "real.tar", "w") as archive:
        archive.add(tmp_path / "real", ".")
    assert len(TarIndex(tmp_path / "real.tar")) == 2


def test_keys_end_at_the_first_dot_of_the_base_name():
    assert [key_of(name) for name in ("a.b/1.x.jpg", "1", ".hidden.jpg", "d/2.jpg")] == ["a.b/1", "1", "", "d/2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (3.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (True, "1"),
        (" x ", "x"),
        ("", None),
    ]
    + [(None, None), ({}, None), ([1, "a"], ["1", "a"]), ([1, [2]], None), ([None], None), ([], [])],
)
def test_what_is_a_label(value, text):
    assert label_text(value) == text


def test_shards_of_any_make_equal_a_direct_reading(tmp_path):
    """Random members: names, depth, order, side files. A direct reading of the archive is the oracle."""
    rng = random.Random(0)
    for number in range(25):
        members, truth = [], {}
        for k in rng.sample(range(10**5), 20):
            key = rng.choice(["", "p/", "p.q/r/"]) + f"{k}"
            image = key + rng.choice([".jpg", ".a.jpeg", ".PNG", ".img"])
            label = rng.choice(["cat", "dog", "7", "10"])
            side = rng.choice([(".cls", label), (".x.cls", label), (".json", json.dumps({"label": label}))])
            members += [(image, jpeg(k)), (key + side[0], side[1].encode())]
            members += [(f"{key}.npy", b"1")] * rng.randint(0, 1) + [(f"._{k}.jpg", b"x")] * rng.randint(0, 1)
            truth[image] = label, jpeg(k)
        rng.shuffle(members)
        pack(tmp_path / f"{number}.tar", members)
        index = TarIndex(tmp_path / f"{number}.tar")
        found = {
            index.relative(i).split("/", 1)[1]: (index.classes[index.label(i)], index.read(i))
            for i in range(len(index))
        }
        assert found == truth
        assert len(scan(LocalShards(tmp_path / f"{number}.tar", "*.tar"), 0).members) == 20


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / f"labels{kind}")
    with pytest.raises(ValueError, match=r"--labels .* cannot be read: not a regular file"):
        read_table(tmp_path / f"labels{kind}")


def test_a_class_map_without_images_is_named(tmp_path):
    write_images(tmp_path / "train", [3, 3])
    write_images(tmp_path / "val", [2])
    (tmp_path / "map.txt").write_text("class_1\n")
    config = Config(data_path=str(tmp_path), class_map=str(tmp_path / "map.txt"))
    assert len(build_source(config, train=True)) == 3
    with pytest.raises(ValueError, match=r"--class_map .*map.txt: the classes that it lists have no validation images"):
        build_source(config, train=False)


def test_files_beside_shards_are_counted_by_ending(tmp_path):
    pack(tmp_path / "a.tar", [("cat/0.jpg", jpeg())])
    pack(tmp_path / "b.tar", [("dog/0.jpg", jpeg())])
    for name in ("c.tar.gz", "d.TAR", "e.zip", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    _, left_out = TarIndex(tmp_path).contents()
    assert left_out == {".gz beside the shards": 1, ".tar beside the shards": 1, ".zip beside the shards": 1}
    _, left_out = TarIndex(f"memory://{tmp_path.name}").contents() if _in_memory(tmp_path) else ({}, left_out)
    assert left_out[".gz beside the shards"] == 1


def _in_memory(folder):
    import fsspec

    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe(f"/{folder.name}/{path.name}", path.read_bytes())
    return True


class Marked:
    """Images of several labels each or of none, as the columns of a table say."""

    def __init__(self, table):
        self.table, self.classes = np.array(table, bool), [f"class {k}" for k in range(len(table[0]))]

    def __len__(self):
        return len(self.table)

    def labels(self):
        return self.table

    def name(self, i):
        return f"images/{i}.jpg"


@pytest.mark.parametrize("how", [{"share": 0.1}, {"per_class": 100}, {"per_class": 1000}])
def test_images_without_a_label_are_held_out_like_others(how):
    source = Marked([[k % 2, 0] for k in range(2000)])
    held = hold_out(source, **how)[1].labels()
    assert 60 <= (~held.any(1)).sum() <= 140 and 60 <= held[:, 0].sum() <= 140


def test_a_rare_label_is_not_held_out_as_a_whole():
    for place in range(40):  # whichever image has it
        source = Marked([[1, k == place] for k in range(40)])
        train, held, none = hold_out(source, share=0.3)
        assert train.labels()[:, 1].sum() == 1 and none == ["class 1"] and 0 < len(held) < 30
