"""Made-up trees in a language of one line each, and where each picture in them belongs.

A row's files stand between `; `:

    train/{cat,dog}/{1..3}.jpg > train 1       pictures of split train; the class is part 1 of the path, "cat"
    train/{a/abbey,b/bar}/1.jpg > train 1:3    parts 1 and 2, joined by a slash
    {train,val}/cat/1.jpg > * 1                the split is part 0
    val/1.jpg > val =cat                       the class by its name; `-` instead: without a label
    train-0.tar: 1.jpg=cat 2.jpg= > train      a tar of 1.jpg, 1.cls and 2.jpg; what stands behind = is the class,
                                               but nothing and -1 are none: left out, or in test without a label
    train-0.tar: 1.jpg=7 2.jpg=@1 > train ~3   2.cls is a hard link to 1.cls; numbers have three digits in class names
    in.tar: n1.tar/1.jpg > train 1             a tar of tars
    train.parquet: 1.jpg=7 2.jpg=8 > train     a file of Hugging Face's, with the columns image and label
    labels.csv <- id,breed|1,pug               a text; | ends a line. `<- devkit 2 1`: the ground truth of a devkit
    notes.txt, empty/, cat/loop -> ..          a file, a folder, a link

What has no `>` is no picture of the data set: it must be left out.
"""

import gzip
import io
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tars import tar_bytes, tree
from tools.make_raw import meta_mat

Truth = dict[str, tuple[str, str | None]]  # path below RAW → split and class
ITEM = re.compile(r"([^=]+?\.\w+)(?:=(.*))?")


class Row(NamedTuple):
    """One tree: it is read as `layout`, or refused in a line that has all of `refusal`."""

    name: str
    files: str
    layout: str = ""
    classes: tuple[str, ...] = ()  # in the order of their labels
    says: tuple[str, ...] = ()  # fragments of the notes and of what is left out
    refusal: tuple[str, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})  # of find_sources; `below`: RAW is this folder of the tree


def reads(name: str, files: str, reading: str, *says: str, **options: Any) -> Row:
    """Return a row that is read as `LAYOUT: CLASS, CLASS`."""
    layout, _, classes = reading.partition(": ")
    return Row(name, files, layout, tuple(c for x in classes.split(", ") for c in expand(x)), says, (), options)


def refuses(name: str, files: str, *fragments: str, **options: Any) -> Row:
    return Row(name, files, refusal=fragments, options=options)


def expand(pattern: str) -> list[str]:
    """Return the words of `a{b,c}{1..3}`."""
    if not (braces := re.search(r"{([^{}]*)}", pattern)):
        return [pattern]
    words = braces[1].split(",")
    if ".." in braces[1]:
        first, last = braces[1].split("..")
        words = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [text for word in words for text in expand(before + word + after)]


def plant(root: Path, files: str) -> Truth:
    """Write a tree below `root`, and return what its rows say of each picture."""
    truth: Truth = {}
    for line in filter(None, files.split("; ")):
        if " <- " in line:
            path, text = line.split(" <- ")
            tree(root, {path: _devkit(text) if text.startswith("devkit ") else text.replace("|", "\n").encode()})
        else:
            truth |= dict(_pictures(root, *line.split(" > ")))
    return truth


def _pictures(root: Path, pattern: str, belongs: str = "") -> Iterator[tuple[str, tuple[str, str | None]]]:
    split, _, rule = belongs.partition(" ")
    pattern, _, target = pattern.partition(" -> ")
    archive, colon, inside = pattern.partition(": ")
    for path in expand(archive):
        words = [item for word in inside.split(" ") for item in expand(word)]
        items = [(match[1], match[2]) for item in words if (match := ITEM.fullmatch(item))]
        folder = root / path if path.endswith("/") else (root / path).parent
        folder.mkdir(parents=True, exist_ok=True)
        if target:
            (root / path).symlink_to(target)
        elif path.endswith(".parquet"):
            _write_parquet(root / path, items)
        elif not path.endswith("/"):
            data = _tar(items) if path.endswith(".tar") else f"not decoded: {path}".encode("utf-8", "surrogateescape")
            (root / path).write_bytes(data)
        labels = dict(items)
        for name, label in items if colon else [("", "")]:
            inner = f"{path}/{name}".rstrip("/")
            if label and label.startswith("@"):
                label = next(labels[other] for other in labels if other.partition(".")[0] == label[1:])
            if split and (label not in (None, "", "-1") or rule[:1] not in ("", "~") or split == "test"):
                yield inner, (inner.partition("/")[0] if split == "*" else split, _class(inner, rule, label))


def _class(path: str, rule: str, label: str | None) -> str | None:
    if rule == "-" or (label in ("", "-1", None) and rule[:1] in ("", "~")):
        return None
    if rule.startswith("="):
        return rule[1:]
    if rule.startswith("~"):
        return f"{int(label):0{rule[1:]}d}"
    if rule:
        first, _, end = rule.partition(":")
        return "/".join(path.split("/")[int(first) : int(end or int(first) + 1)]).removesuffix(".tar")
    return label


def _tar(items: list[tuple[str, str | None]]) -> bytes:
    """Return a tar of files or of tars; beside each file with a label its .cls, or a hard link to another's."""
    out, inner = io.BytesIO(), {name.partition("/")[0]: [] for name, _ in items if ".tar/" in name}
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, data: bytes, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.linkname, info.type = len(data), link, tarfile.LNKTYPE if link else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))

        for name, label in items:
            if ".tar/" in name:
                inner[name.partition("/")[0]].append((name.partition("/")[2], label))
                continue
            add(name, f"not decoded: {name}".encode())
            if label:
                link = f"{label[1:]}.cls" if label.startswith("@") else ""
                add(f"{name.rpartition('.')[0]}.cls", b"" if link else label.encode(), link)
        for name, members in inner.items():
            add(name, _tar(members))
    return out.getvalue()


def _write_parquet(path: Path, items: list[tuple[str, str | None]]) -> None:
    """Write images and labels: numbers, if all are; null for none."""
    labels: list[Any] = [label or None for _, label in items]
    if all(label is None or re.fullmatch("-?[0-9]+", label) for label in labels):
        labels = [None if label is None else int(label) for label in labels]
    images = [{"bytes": f"not decoded: {name}".encode(), "path": name} for name, _ in items]
    pq.write_table(pa.table({"image": pa.array(images), "label": pa.array(labels)}), path)


def _devkit(text: str) -> bytes:
    """Return ILSVRC2012_devkit_t12.tar.gz for n90417263 (id 1) and n90128845 (id 2), one training picture each."""
    truth = "".join(f"{number}\n" for number in text.split()[1:]).encode()
    files = {"meta.mat": meta_mat(2, 1), "ILSVRC2012_validation_ground_truth.txt": truth}
    return gzip.compress(tar_bytes({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in files.items()}))


def missing(fragments: tuple[str, ...], text: str) -> list[str]:
    """Return the fragments that `text` lacks as whole words; of those that end in … it must have a word's beginning."""
    ends = {fragment: "" if fragment.endswith("…") else "(?![A-Za-z0-9])" for fragment in fragments}
    return [x for x, end in ends.items() if not re.search(f"(?<![A-Za-z0-9]){re.escape(x.rstrip('…'))}{end}", text)]


NFD = unicodedata.normalize("NFD", "café")
WNIDS = "n01440764, n01443537"
DEPTH, FLAGGED = "--class-depth", "--allow-incomplete"

FOLDERS = [
    # ---- one folder per class
    reads("three classes", "{cat,dog,owl}/{1,2}.jpg > train 0", "class-folders: cat, dog, owl"),
    reads("suffixes", "cat/1.JPG > train 0; dog/{1.jpeg,2.PNG,3.jfif,4.JPE,5.webp} > train 0",
          "class-folders: cat, dog"),
    reads("numbers", "{0..11}/1.jpg > train 0", "class-folders: {0..11}"),
    reads("numbers, some with zeros", "{8,9,010}/1.jpg > train 0", "class-folders: 8, 9, 010"),
    reads("numbers and a word", "{1,2,10,rest}/1.jpg > train 0", "class-folders: 1, 10, 2, rest",
          "numbers and words"),
    reads("near misses of splits", "{bullet_train,latest,testudo,train_station,trainers,valley,vale}/1.jpg > train 0",
          "class-folders: bullet_train, latest, testudo, train_station, trainers, vale, valley"),
    refuses("a class called train", "{bus,car,train}/{1,2}.jpg", "train", "--layout class-folders"),
    reads("a class called train, by name", "{bus,car,train}/{1,2}.jpg > train 0", "class-folders: bus, car, train",
          layout="class-folders"),
    refuses("a class called images", "{birds,cats,images}/1.jpg", "images", "--layout class-folders"),
    reads("NFC and NFD", f"café/1.jpg > train 0; {NFD}/2.jpg > train =café; tea/3.jpg > train 0",
          "class-folders: café, tea", "café"),
    reads("NFD in train, NFC in val", f"train/{NFD}/1.jpg > train =café; train/tea/2.jpg > train 1; "
          "val/{café,tea}/3.jpg > val 1", "split-folders: café, tea"),
    reads("two cases", "{Cat,cat,dog}/1.jpg > train 0", "class-folders: Cat, cat, dog", "Cat", "cat"),
    reads("Latin-1", "caf\udce9/1.jpg > train =caf\\xe9; tea/1.jpg > train 0", "class-folders: caf\\xe9, tea"),
    reads("words of a mapping", "{n01440764,n01443537}/1.JPEG > train 0; LOC_synset_mapping.txt <- n01440764 tench",
          f"class-folders: {WNIDS}"),
    refuses("an empty class", "{ape,bee}/1.jpg; aardvark/", "aardvark", FLAGGED),
    reads("an empty class, allowed", "{ape,bee}/1.jpg > train 0; aardvark/", "class-folders: aardvark, ape, bee",
          "aardvark", allow_incomplete=True),
    refuses("a class of .heic", "{ape,bee}/1.jpg; cat/{1..3}.heic", "cat", ".heic"),
    refuses("all without extension", "{ape,bee}/{1..3}", "extension…"),
    refuses("one folder", "photos/{1..3}.jpg", "photos"),
    refuses("one level too high", "holidays/{cat,dog}/1.jpg", "holidays"),
    refuses("a Windows zip's backslashes", r"train\{cat,dog}\{1,2}.jpg", "backslash…"),
    reads("a banner", "{cat,dog}/{1,2}.jpg > train 0; banner.png; README.md", "class-folders: cat, dog", "banner.png"),
    reads("a loop", "{cat,dog}/1.jpg > train 0; cat/self -> ..", "class-folders: cat, dog", "cat/self"),
    reads("a link to nothing", "{cat,dog}/1.jpg > train 0; cat/2.jpg -> gone.jpg", "class-folders: cat, dog",
          "cat/2.jpg"),
    reads("annotations beside", "{cat,dog}/{1,2}.jpg > train 0; {cat,dog}/xml/{1,2}.xml", "class-folders: cat, dog"),
    reads("a plain tar beside", "{cat,dog}/1.jpg > train 0; backup.tar: cat/1.jpg dog/1.jpg", "class-folders: cat, dog",
          "backup.tar"),
    refuses("shards beside", "{cat,dog}/1.jpg; train-000000.tar: 1.jpg=cat 2.jpg=dog", "--layout webdataset",
            "--layout class-folders"),
    refuses("parquet beside", "{cat,dog}/1.jpg; train.parquet: 1.jpg=0 2.jpg=1", "--layout parquet",
            "--layout class-folders"),
    # ---- junk
    reads("Synology", "{cat,dog}/{1,2}.jpg > train 0; {cat,dog}/@eaDir/{1,2}.jpg/SYNOPHOTO_THUMB_{B,M}.jpg; "
          "@eaDir/x.jpg; #recycle/cat/3.jpg", "class-folders: cat, dog", "@eaDir", "#recycle"),
    reads("QNAP and Linux", "{cat,dog}/1.jpg > train 0; @Recycle/1.jpg; cat/.thumbnails/1.jpg; lost+found/2.jpg; "
          ".Trash-1000/files/3.jpg", "class-folders: cat, dog", "lost+found", "@Recycle"),
    reads("Windows", "{cat,dog}/1.jpg > train 0; {cat,dog}/{Thumbs.db,desktop.ini}; $RECYCLE.BIN/S-1-5/$R1.jpg; "
          "System Volume Information/{1.jpg,IndexerVolumeGuid}", "class-folders: cat, dog", "$RECYCLE.BIN",
          "System Volume Information"),
    reads("macOS", "train/{cat,dog}/{1..20}.jpg > train 1; train/{cat,dog}/._{1..20}.jpg; train/.DS_Store; "
          "val/{cat,dog}/9.jpg > val 1; __MACOSX/train/cat/._1.jpg; __MACOSX/train/cat/2.jpg",
          "split-folders: cat, dog", "__MACOSX", "._…"),
    reads("notebooks", "train/{cat,dog}/1.jpg > train 1; train/.ipynb_checkpoints/1-checkpoint.jpg; "
          "val/{cat,dog}/2.jpg > val 1; val/cat/.ipynb_checkpoints/2-checkpoint.jpg", "split-folders: cat, dog"),
    # ---- train/, val/, test/
    reads("train and val", "{train,val}/{cat,dog}/{1,2}.jpg > * 1", "split-folders: cat, dog"),
    reads("train, valid and a flat test", "train/{cat,dog}/1.jpg > train 1; valid/{cat,dog}/2.jpg > val 1; "
          "test/{3,4}.jpg > test -", "split-folders: cat, dog"),
    reads("flowers: numbers", "train/{1,2,10}/1.jpg > train 1; validation/{1,2,10}/2.jpg > val 1",
          "split-folders: 1, 2, 10"),
    reads("CIFAR-10", "train/{airplane,frog}/000{1,2}.png > train 1; test/{airplane,frog}/0001.png > test 1; "
          "labels.txt", "split-folders: airplane, frog", ".txt"),
    reads("MNIST", "training/{0..9}/1.png > train 1; testing/{0..9}/1.png > test 1", "split-folders: {0..9}"),
    reads("brain tumours", "Training/{glioma,notumor}/1.jpg > train 1; Testing/{glioma,notumor}/2.jpg > test 1",
          "split-folders: glioma, notumor"),
    reads("capitals", "TRAIN/{cat,dog}/1.jpg > train 1; VALID/{cat,dog}/2.jpg > val 1", "split-folders: cat, dog"),
    reads("_images", "train_images/{cat,dog}/1.jpg > train 1; test_images/{cat,dog}/2.jpg > test 1",
          "split-folders: cat, dog"),
    reads("Images", "TrainImages/{cat,dog}/1.jpg > train 1; TestImages/{cat,dog}/2.jpg > test 1",
          "split-folders: cat, dog"),
    reads("years", "train2017/{cat,dog}/1.jpg > train 1; val2017/{cat,dog}/2.jpg > val 1; test2017/3.jpg > test -",
          "split-folders: cat, dog"),
    refuses("COCO", "{train,val}2017/00000000000{1,2}.jpg; annotations/instances_train2017.json", "train2017"),
    reads("ImageNet-21k-P", "imagenet21k_train/{n01440764,n01443537}/1.JPEG > train 1; "
          "imagenet21k_val/{n01440764,n01443537}/2.JPEG > val 1", f"split-folders: {WNIDS}"),
    reads("Intel scenes", "seg_train/seg_train/{forest,sea}/1.jpg > train 2; "
          "seg_test/seg_test/{forest,sea}/2.jpg > test 2; seg_pred/seg_pred/{3,4}.jpg", "split-folders: forest, sea",
          "seg_train/seg_train", "seg_pred"),
    reads("cats and dogs", "training_set/training_set/{cats,dogs}/1.jpg > train 2; "
          "test_set/test_set/{cats,dogs}/2.jpg > test 2", "split-folders: cats, dogs", "training_set/training_set"),
    reads("twice train", "{train/train,val/val}/{cat,dog}/1.jpg > * 2", "split-folders: cat, dog", "train/train"),
    reads("a class called train in train", "{train,val}/{bus,train}/1.jpg > * 1", "split-folders: bus, train"),
    refuses("mixed spelling", "train/{cat,dog}/1.jpg; test_images/{cat,dog}/2.jpg", "train", "test_images"),
    reads("train beside Val", "train/{cat,dog}/1.jpg > train 1; Val/{cat,dog}/2.jpg > val 1",
          "split-folders: cat, dog"),
    refuses("two of one split", "{train,Train}/{cat,dog}/1.jpg", "train", "Train"),
    refuses("val and validation", "train/{cat,dog}/1.jpg; {val,validation}/{cat,dog}/2.jpg", "val", "validation"),
    refuses("dev", "{train,dev}/{cat,dog}/1.jpg", "dev"),
    refuses("eval", "{train,eval}/{cat,dog}/1.jpg", "eval"),
    refuses("train_val", "{train_val,test}/{cat,dog}/1.jpg", "train_val"),
    refuses("val alone", "val/{cat,dog}/1.jpg", "val"),
    refuses("no picture in train", "train/{cat,dog}/1.txt; val/{cat,dog}/1.jpg", "train"),
    refuses("splits one level too high", "holidays/{train,val}/{cat,dog}/1.jpg", "holidays"),
    refuses("fruits-360", "{Training,Test}/{Apple Braeburn,Kiwi}/1.jpg; test-multiple_fruits/{3,4}.jpg",
            "test-multiple_fruits", "--layout"),
    reads("fruits-360, by name", "Training/{Apple Braeburn,Kiwi}/1.jpg > train 1; "
          "Test/{Apple Braeburn,Kiwi}/2.jpg > test 1; test-multiple_fruits/{3,4}.jpg",
          "split-folders: Apple Braeburn, Kiwi", "test-multiple_fruits", layout="split-folders"),
    reads("traffic signs", "Train/{0..42}/1.png > train 1; Test/{1,2}.png > test -; Meta/{0..42}.png; {Train,Test}.csv",
          "split-folders: {0..42}", "Meta", "43"),
    refuses("traffic signs, twice", "{Train,train}/{0..3}/1.png; {Test,test}/1.png; {Meta,meta}/0.png", "Train",
            "train"),
    reads("chest X-rays", "{train,val,test}/{NORMAL,PNEUMONIA}/1.jpeg > * 1; "
          "chest_xray/train/{NORMAL,PNEUMONIA}/1.jpeg; __MACOSX/train/._1.jpeg", "split-folders: NORMAL, PNEUMONIA",
          "chest_xray"),
    refuses("ImageNet-100 in parts", "train.X{1,2}/{n01440764,n01443537}/1.JPEG; val.X/{n01440764,n01443537}/2.JPEG; "
            "Labels.json <- {}", "train.X1"),
    reads("a sample in train", "train/{cat,dog}/1.jpg > train 1; train/samples.png; val/{cat,dog}/2.jpg > val 1",
          "split-folders: cat, dog", "train/samples.png"),
    refuses("val of other classes", "train/{cat,dog}/1.jpg; val/{lion,wolf}/2.jpg", "val", "lion"),
    reads("test of no class", "train/{cat,dog}/1.jpg > train 1; test/unknown/{2,3}.jpg > test -",
          "split-folders: cat, dog", "test"),
    refuses("val empty", "train/{cat,dog}/1.jpg; val/", "val", FLAGGED),
    reads("val empty, allowed", "train/{cat,dog}/1.jpg > train 1; val/", "split-folders: cat, dog",
          allow_incomplete=True),
    refuses("test empty", "{train,val}/{cat,dog}/1.jpg; test/", "test", FLAGGED),
    refuses("val flat", "train/{n01440764,n01443537}/1.JPEG; val/ILSVRC2012_val_0000000{1,2}.JPEG", "val", "devkit"),
    refuses("val half moved", "train/{n01440764,n01443537}/1.JPEG; val/n01440764/ILSVRC2012_val_00000001.JPEG; "
            "val/ILSVRC2012_val_00000009.JPEG", "val", "ILSVRC2012_val_00000009.JPEG"),
    refuses("a class of train empty", "train/{ape,bee}/1.jpg; train/aardvark/; val/{ape,bee}/2.jpg", "aardvark",
            FLAGGED),
    reads("a class without validation", "train/{ape,bee}/1.jpg > train 1; val/ape/2.jpg > val 1",
          "split-folders: ape, bee"),
    # ---- the class is not the first folder
    refuses("Places365", "train/{a/abbey,b/bar,c/canyon/rocky}/1.jpg; val/{a/abbey,b/bar,c/canyon/rocky}/2.jpg", DEPTH,
            "abbey"),
    reads("Places365 at depth 2", "{train,val}/{a/abbey,b/bar}/1.jpg > * 1:3; "
          "train/c/canyon/rocky/1.jpg > train =c/canyon; train/a/0.jpg", "split-folders: a/abbey, b/bar, c/canyon",
          "train/a/0.jpg", "rocky", class_depth=2),
    reads("at depth 1", "{a/abbey,b/bar,c/canyon/rocky}/1.jpg > train 0", "class-folders: a, b, c", class_depth=1),
    refuses("iNaturalist 2018", "{Aves/{9,10},Plantae/3}/1.jpg", DEPTH, "Aves"),
    reads("iNaturalist 2018 at depth 2", "Aves/{9,10}/1.jpg > train 0:2; Plantae/3/1.jpg > train 0:2",
          "class-folders: Aves/10, Aves/9, Plantae/3", class_depth=2),
    refuses("iNaturalist 2018 from above", "train_val2018/{Aves,Plantae}/{9,10}/1.jpg", "train_val2018"),
    reads("iNaturalist 2021", "{train,val}/0000{0_Animalia_Annelida,1_Plantae_Bryophyta}/1.jpg > * 1; train.json <- {}",
          "split-folders: 00000_Animalia_Annelida, 00001_Plantae_Bryophyta"),
    refuses("DomainNet", "{clipart,real}/{airplane,zebra}/1.jpg", DEPTH, "clipart"),
    refuses("PlantVillage", "{color,grayscale,segmented}/{Apple___scab,Corn___rust}/1.JPG", DEPTH, "color"),
    refuses("kittens", "{cat,dog}/1.jpg; cat/kittens/2.jpg", DEPTH, "kittens"),
    refuses("images in each class", "{cat,dog}/images/1.jpg", DEPTH, "images"),
    refuses("Food-101", "images/{apple_pie,waffles}/1.jpg; meta/{train,test}.txt; license_agreement.txt", "images"),
    reads("Food-101's images", "images/{apple_pie,waffles}/1.jpg > train 1; meta/train.txt",
          "class-folders: apple_pie, waffles", below="images"),
    refuses("Stanford Dogs", "Images/n0208562{0-Chihuahua,1-Basset}/1.jpg; Annotation/n0208562{0-Chihuahua,1-Basset}/1",
            "Images"),
    refuses("Stanford Cars", "cars_train/0000{1,2}.jpg; cars_test/0000{1,2}.jpg; devkit/cars_train_annos.mat",
            "cars_train"),
    refuses("Kaggle's Stanford Cars from above", "car_data/car_data/{train,test}/{Acura RL,Audi TT}/1.jpg; names.csv",
            "car_data"),
    refuses("Caltech-256 from above", "256_ObjectCategories/{001.ak47,002.flag}/1.jpg", "256_ObjectCategories"),
    reads("Caltech-256", "{001.ak47,002.flag,257.clutter}/1.jpg > train 0",
          "class-folders: 001.ak47, 002.flag, 257.clutter"),
    refuses("EuroSAT from above", "2750/{Forest,River}/1.jpg", "2750"),
    refuses("Oxford flowers", "jpg/image_0000{1,2}.jpg; imagelabels.mat; setid.mat", "jpg"),
    refuses("cats and dogs of Microsoft", "PetImages/{Cat,Dog}/1.jpg; MSR-LA - 3467.docx; readme[1].txt", "PetImages"),
    # ---- relatives of ImageNet
    reads("Imagenette", "{train,val}/{n01440764,n01443537}/1.JPEG > * 1; "
          "noisy_imagenette.csv <- path,noisy_labels_0|train/n01440764/1.JPEG,n01443537", f"split-folders: {WNIDS}",
          ".csv"),
    reads("ImageNet-R", "{n01440764,n01443537}/art_0.jpg > train 0; README.txt", f"class-folders: {WNIDS}"),
    reads("ImageNet-A", "{n01440764,n01443537}/0.0001_tench _ goldfish_0.9.jpg > train 0; README.txt",
          f"class-folders: {WNIDS}"),
    reads("ImageNet-V2", "{0..11}/0a1b.jpeg > train 0", "class-folders: {0..11}"),
    refuses("ImageNet-Sketch", "sketch/{n01440764,n01443537}/sketch_0.JPEG", "sketch"),
    reads("flat WNID files", "n01440764_1.JPEG > train =n01440764; n01443537_2.JPEG > train =n01443537; mean.png",
          f"flat: {WNIDS}", "mean.png"),
    reads("synset tars", "n01440764.tar: 1.JPEG 2.JPEG > train 0; n01443537.tar: 3.JPEG > train 0",
          f"fall2011: {WNIDS}"),
    reads("a tar of synset tars", "fall11_whole.tar: n01440764.tar/1.JPEG n01443537.tar/2.JPEG > train 1",
          f"fall2011: {WNIDS}"),
    reads("a tar beside its folder", "{n01440764,n01443537}.tar: 1.JPEG > train 0; n01440764/1.JPEG",
          f"fall2011: {WNIDS}", "n01440764"),
]  # fmt: skip
