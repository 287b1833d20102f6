"""Trees as people have them: each is read with the right split and class of every picture, or refused in one line."""

import json
import re
from pathlib import Path

import pytest

from conftest import build, picture
from pipeline import UserError, manifest
from pipeline.offline.sources import LAYOUTS, find_sources
from trees import FLAGGED, FOLDERS, WNIDS, Row, missing, plant, reads, refuses

KIT = "ILSVRC2012_devkit_t12.tar.gz <- devkit 2 1"  # validation picture 1 is of the class with id 2
TRAIN = "train-000000.tar: 1.jpg=cat 2.jpg=dog"
KAGGLE = "ILSVRC/Data/CLS-LOC"
TINY = ("wnids.txt <- n01443537|n01440764|; words.txt <- n01440764\ttench|n01443537\tgoldfish|n00000001\tother; "
        "train/{n01440764,n01443537}/images/x_{0,1}.JPEG > train 1; train/n01440764/n01440764_boxes.txt; "
        "val/images/val_0.JPEG > val =n01443537; test/images/test_0.JPEG > test -; ")  # fmt: skip
NOTED = "val/val_annotations.txt <- val_0.JPEG\tn01443537\t0\t0\t1\t1|val_1.JPEG\tn01440764\t0\t0\t1\t1"

FILES = [
    # ---- ImageNet's own archives
    reads("archives", "ILSVRC2012_img_train.tar: n90417263.tar/1.JPEG n90128845.tar/2.JPEG > train 1; "
          "ILSVRC2012_img_val.tar: ILSVRC2012_val_00000001.JPEG > val =n90128845; "
          "ILSVRC2012_devkit_t12.tar.gz <- devkit 2", "ilsvrc2012: n90128845, n90417263"),
    reads("unpacked", "train/{n90417263,n90128845}/1.JPEG > train 1; "
          "val/ILSVRC2012_val_00000001.JPEG > val =n90128845; " f"val/ILSVRC2012_val_00000002.JPEG > val =n90417263; "
          f"{KIT}", "ilsvrc2012: n90128845, n90417263"),
    reads("archives in small letters",
          "ilsvrc2012_img_train.tar: n90417263.tar/1.JPEG n90128845.tar/2.JPEG > train 1; "
          "ilsvrc2012_img_val.tar: ILSVRC2012_val_00000001.JPEG > val =n90128845; "
          "ilsvrc2012_devkit_t12.tar.gz <- devkit 2", "ilsvrc2012: n90128845, n90417263"),
    refuses("archives, a second download", "ILSVRC2012_img_train(1).tar: n90417263.tar/1.JPEG n90128845.tar/2.JPEG; "
            f"ILSVRC2012_img_val.tar: ILSVRC2012_val_00000001.JPEG; {KIT}", "ILSVRC2012_img_train"),
    refuses("the training archive alone", "ILSVRC2012_img_train.tar: n01440764.tar/1.JPEG", "1,281,167", FLAGGED),
    reads("the training archive alone, allowed",
          "ILSVRC2012_img_train.tar: n01440764.tar/1.JPEG n01443537.tar/2.JPEG > train 1", f"ilsvrc2012: {WNIDS}",
          "1,281,167", allow_incomplete=True),
    refuses("the validation archive alone", "ILSVRC2012_img_val.tar: ILSVRC2012_val_00000001.JPEG",
            "ILSVRC2012_img_train.tar"),
    reads("2010, allowed", "ILSVRC2010_images_train.tar: n01440764.tar/1.JPEG n01443537.tar/2.JPEG > train 1",
          f"ilsvrc2010: {WNIDS}", "1,261,406", allow_incomplete=True),
    reads("Kaggle", f"{KAGGLE}/train/{{n01440764,n01443537}}/1.JPEG > train 4; {KAGGLE}/val/V1.JPEG > val =n01443537; "
          f"{KAGGLE}/test/T1.JPEG > test -; LOC_val_solution.csv <- ImageId,PredictionString|V1,n01443537 1 2 3 4; "
          "LOC_synset_mapping.txt <- n01440764 tench|n01443537 goldfish", f"kaggle: {WNIDS}"),
    refuses("Kaggle, one level too low", f"{KAGGLE}/train/{{n01440764,n01443537}}/1.JPEG; "
            f"{KAGGLE}/val/ILSVRC2012_val_00000001.JPEG; " "LOC_val_solution.csv <- ImageId,PredictionString", "val",
            below=KAGGLE),
    # ---- Tiny ImageNet
    reads("Tiny ImageNet", TINY + NOTED + "; val/images/val_1.JPEG > val =n01440764", f"tiny-imagenet: {WNIDS}"),
    refuses("Tiny ImageNet without its notes", TINY, "val_annotations.txt"),
    refuses("Tiny ImageNet of another", TINY + NOTED.replace("n01443537", "n09999999"), "n09999999"),
    reads("Tiny ImageNet, a picture more",
          TINY + NOTED + "; val/images/val_1.JPEG > val =n01440764; val/images/val_7.JPEG", f"tiny-imagenet: {WNIDS}",
          "val_7.JPEG"),
    refuses("Tiny ImageNet from above", "tiny-imagenet-200/wnids.txt <- n01440764; "
            "tiny-imagenet-200/train/n01440764/images/1.JPEG; tiny-imagenet-200/val/images/1.JPEG",
            "tiny-imagenet-200"),
    reads("Tiny ImageNet, val sorted by a script", "wnids.txt <- n01443537|n01440764; "
          "{train,val}/{n01440764,n01443537}/images/x.JPEG > * 1; test/images/1.JPEG > test -",
          f"tiny-imagenet: {WNIDS}"),
    refuses("Tiny ImageNet without its lists", "train/{n01440764,n01443537}/images/1.JPEG; val/images/1.JPEG",
            "images"),
    # ---- WebDataset
    reads("shards", "train-00000{0..2}.tar: 1.jpg=0 2.jpg=10 3.jpg=9 > train ~2; val-000000.tar: 1.jpg=9 > val ~2",
          "webdataset: 00, 09, 10"),
    reads("shards in data/", f"data/{TRAIN} > train; data/test-000000.tar: 3.jpg=dog 4.jpg= > test",
          "webdataset: cat, dog"),
    reads("shards in folders", "{train,val}/0000{0,1}.tar: 1.jpg=cat 2.jpg=dog > *", "webdataset: cat, dog"),
    reads("shards of timm", "imagenet1k-train-000{0,1}.tar: 1.jpg=3 2.jpg=4 > train; "
          "imagenet1k-validation-00.tar: 1.jpg=3 > val", "webdataset: 3, 4"),
    refuses("shards with a hole", "train-00000{0,1,3}.tar: 1.jpg=cat 2.jpg=dog", "train-000002.tar", FLAGGED),
    reads("shards with a hole, allowed", "train-00000{0,1,3}.tar: 1.jpg=cat 2.jpg=dog > train", "webdataset: cat, dog",
          "train-000002.tar", allow_incomplete=True),
    refuses("a million shards", "shard-{0000000,0999999}.tar: 1.jpg=cat 2.jpg=dog", "shard-0000001.tar", FLAGGED),
    refuses("shards of a known number", "train-0000{0,2}-of-00003.tar: 1.jpg=cat 2.jpg=dog",
            "train-00001-of-00003.tar"),
    reads("shards of a valley", "valley-00000{0,1}.tar: 1.jpg=cat 2.jpg=dog > train", "webdataset: cat, dog"),
    reads("shards of a test bench", "test-bench-train-000000.tar: 1.jpg=cat 2.jpg=dog > train", "webdataset: cat, dog"),
    refuses("some shards of a split", f"{TRAIN}; extra-000000.tar: 3.jpg=cat", "extra-000000.tar"),
    reads("dots in keys", "train-000000.tar: a.1.jpg=cat b.2.jpg=dog > train", "webdataset: cat, dog"),
    reads("labels that are hard links", "train-000000.tar: 1.jpg=cat 2.jpg=@1 3.jpg=dog 4.jpg=@3 > train",
          "webdataset: cat, dog"),
    reads("a picture without a label", "train-000000.tar: 1.jpg=cat 2.jpg=dog 3.jpg= > train", "webdataset: cat, dog",
          "3.jpg"),
    reads("minus one", "train-000000.tar: 1.jpg=4 2.jpg=-1 3.jpg=7 > train; test-000000.tar: 1.jpg=-1 > test",
          "webdataset: 4, 7"),
    reads("labels from 3", "train-000000.tar: 1.jpg=3 2.jpg=5 3.jpg=10 > train ~2", "webdataset: 03, 05, 10",
          "3, 5, 10"),
    reads("labels from 3, kept", "train-000000.tar: 1.jpg=3 2.jpg=5 3.jpg=10 > train ~2", "webdataset: {00..10}",
          keep_labels=True),
    refuses("words, kept", TRAIN, "cat", "--keep-labels", keep_labels=True),
    refuses("a negative number, kept", "train-000000.tar: 1.jpg=-2 2.jpg=3", "-2", "--keep-labels", keep_labels=True),
    reads("a number and a word", "train-000000.tar: 1.jpg=10 2.jpg=9 3.jpg=cat > train", "webdataset: 10, 9, cat"),
    refuses("no label at all", "train-000000.tar: 1.jpg= 2.jpg=", "train-000000.tar", ".cls"),
    refuses("compressed shards", "train-00000{0,1}.tar.gz", ".tar.gz"),
    refuses("folders and shards in train", f"train/{{cat,dog}}/1.jpg; train/{TRAIN}", "--layout"),
    # ---- parquet
    reads("Hugging Face", "data/train-0000{0,1}-of-00002.parquet: 1.jpg=0 2.jpg=1 > train; "
          "data/validation-00000-of-00001.parquet: 3.jpg=1 > val; data/test-00000-of-00001.parquet: 4.jpg=-1 > test; "
          "README.md", "parquet: 0, 1"),
    reads("parquet of numbers", "train.parquet: 1.jpg=11 2.jpg=3 3.jpg=3 > train ~2", "parquet: 03, 11", "3, 11"),
    reads("parquet of words", "{train,val}/0000.parquet: 1.jpg=cat 2.jpg=dog > *", "parquet: cat, dog"),
    refuses("a parquet file missing", "data/train-0000{0,2}-of-00003.parquet: 1.jpg=0 2.jpg=1", "train-00001-of-00003",
            FLAGGED),
    reads("a parquet file missing, allowed", "data/train-0000{0,2}-of-00003.parquet: 1.jpg=0 2.jpg=1 > train",
          "parquet: 0, 1", "train-00001-of-00003", allow_incomplete=True),
    refuses("a numbered parquet file missing", "000{0,2}.parquet: 1.jpg=0 2.jpg=1", "0001.parquet"),
    refuses("a parquet file of no split", "{train,metadata}.parquet: 1.jpg=0 2.jpg=1", "metadata.parquet"),
    reads("pictures of a README", "data/train-00000-of-00001.parquet: 1.jpg=0 2.jpg=1 > train; assets/{1,2}.png; "
          "README.md", "parquet: 0, 1", "assets"),
    # ---- other formats
    refuses("Arrow", "data-00000-of-00001.arrow; state.json <- {}; dataset_info.json <- {}", ".arrow"),
    refuses("MosaicML", "index.json <- {}; shard.0000{0,1}.mds", ".mds"),
    refuses("FFCV", "{train,val}.beton", ".beton"),
    refuses("a zip", "imagenet-object-localization-challenge.zip", ".zip"),
    # ---- a table of labels beside flat pictures
    refuses("breeds", "train/{a1,a2}.jpg; test/z9.jpg; labels.csv <- id,breed|a1,pug|a2,boxer", "--labels",
            "labels.csv"),
    reads("breeds by stem", "train/a1.jpg > train =pug; train/a2.jpg > train =boxer; test/z9.jpg > test -; "
          "labels.csv <- id,breed|a1,pug|a2,boxer", "labels: boxer, pug", labels="labels.csv"),
    reads("file names and tabs", "img/1.jpg > train =cat; img/2.jpg > train =dog; l.tsv <- 1.jpg\tcat|2.jpg\tdog",
          "labels: cat, dog", labels="l.tsv"),
    reads("paths", "a/1.jpg > train =cat; b/1.jpg > train =dog; l.csv <- file,label|a/1.jpg,cat|b/1.jpg,dog",
          "labels: cat, dog", labels="l.csv"),
    reads("quoted labels", 'a/1.jpg > train =cat,black; a/2.jpg > train =dog; '
          'l.csv <- file,label|1.jpg,"cat,black"|2.jpg,dog', "labels: cat,black, dog", labels="l.csv"),
    refuses("metadata.jsonl", 'train/{1,2}.jpg; train/metadata.jsonl <- {"file_name": "1.jpg", "label": "cat"}',
            "metadata.jsonl", "--labels"),
    reads("JSON lines", "train/1.jpg > train =cat; train/2.jpg > train =dog; train/metadata.jsonl <- "
          '{"file_name": "1.jpg", "label": "cat"}|{"file_name": "2.jpg", "label": "dog"}', "labels: cat, dog",
          labels="train/metadata.jsonl"),
    refuses("two labels", "img/{1,2}.jpg; l.csv <- 1.jpg,cat|2.jpg,dog|1.jpg,dog", "1.jpg", "cat", "dog",
            labels="l.csv"),
    refuses("two pictures of one stem", "{a,b}/1.jpg; l.csv <- 1,cat|2,dog", "1.jpg", labels="l.csv"),
    refuses("a picture more", "img/{1,2,3}.jpg; l.csv <- 1.jpg,cat|2.jpg,dog", "img/3.jpg", FLAGGED, labels="l.csv"),
    refuses("a row more", "img/{1,2}.jpg; l.csv <- 1.jpg,cat|2.jpg,dog|77.jpg,cat", "77.jpg", FLAGGED, labels="l.csv"),
    reads("a picture and a row more, allowed", "img/1.jpg > train =cat; img/2.jpg > train =dog; img/3.jpg; "
          "l.csv <- 1.jpg,cat|2.jpg,dog|77.jpg,cat", "labels: cat, dog", "img/3.jpg", "77.jpg", labels="l.csv",
          allow_incomplete=True),
    reads("a table of many columns", "img/1.jpg > train =mel; img/2.jpg > train =nv; "
          "meta.csv <- lesion_id,image_id,dx,age|H1,1,mel,80|H2,2,nv,30", "labels: mel, nv",
          labels="meta.csv"),
    refuses("dogs and cats in names", "train/{cat,dog}.{0,1}.jpg", "train"),
    refuses("pets in names", "images/{Abyssinian,beagle}_1.jpg; annotations/list.txt", "images"),
]  # fmt: skip

NEAR = [  # to what is above
    reads("a class of each script", "{犬,кот,🐈,a b}/1.jpg > train 0", "class-folders: a b, кот, 犬, 🐈"),
    reads("numbers below zero", "{-2,0,2,10}/1.jpg > train 0", "class-folders: -2, 0, 2, 10"),
    reads("digits that are no decimals", "{1,10,2,²}/1.jpg > train 0", "class-folders: 1, 10, 2, ²"),
    reads("long numbers", "{9,88888888888888888888}/1.jpg > train 0", "class-folders: 9, 88888888888888888888"),
    reads("numbers from 3, kept", "{3,5,10}/1.jpg > train 0", "class-folders: {0..10}",
          keep_labels=True),
    refuses("a class called test", "{alpha,beta,test}/{1,2}.jpg", "test", "--layout class-folders"),
    reads("a table beside class folders", "{cat,dog}/1.jpg > train 0; labels.csv <- 1,cat", "class-folders: cat, dog",
          ".csv"),
    reads("hidden folders", "{cat,dog}/1.jpg > train 0; .git/1.jpg; .cache/huggingface/2.jpg",
          "class-folders: cat, dog"),
    reads("unlabelled pictures beside", "{train,test}/{cat,dog}/1.png > * 1; unlabeled/{1..3}.png",
          "split-folders: cat, dog", "unlabeled", "3"),
    reads("a folder of classes beside", "{train,val}/{cat,dog}/1.png > * 1; extra/{cat,owl}/{1,2}.png",
          "split-folders: cat, dog", "extra", "4"),
    refuses("parts of a split", "train_{1,2}/{cat,dog}/1.jpg; val/{cat,dog}/1.jpg", "train_1"),
    refuses("clean and noisy", "train_{clean,noisy}/{cat,dog}/1.jpg; val/{cat,dog}/1.jpg", "train_noisy"),
    refuses("a val that lies deeper", "train/{cat,dog}/1.jpg; val/{cat,dog}/images/2.jpg", "--class-depth", "images"),
    refuses("half twice train", "train/train/{cat,dog}/1.jpg; train/{cat,dog}/1.jpg", "train/train"),
    refuses("class tars", "train/{cat,dog}.tar: 1.jpg 2.jpg", "cat.tar"),
    refuses("a tar of folders", "imagenet.tar: train/cat/1.jpg train/dog/1.jpg", "imagenet.tar"),
    refuses("depth 2 of flat classes", "{cat,dog}/1.jpg", "--class-depth", class_depth=2),
    reads("depth 3", "{Aves/Corvus,Plantae/Salix}/{9,10}/1.jpg > train 0:3",
          "class-folders: Aves/Corvus/10, Aves/Corvus/9, Plantae/Salix/10, Plantae/Salix/9", class_depth=3),
    reads("images in each class at depth 1", "{train,val}/{cat,dog}/images/1.jpg > * 1", "split-folders: cat, dog",
          class_depth=1),
    reads("links of the hub", "blobs/a1; snapshots/0a1b/{cat,dog}/1.jpg -> ../../../blobs/a1 > train 2",
          "class-folders: cat, dog", below="snapshots/0a1b"),
    reads("synset tars in train", "train/{n90417263,n90128845}.tar: 1.JPEG > train 1; "
          f"val/ILSVRC2012_val_00000001.JPEG > val =n90128845; val/ILSVRC2012_val_00000002.JPEG > val =n90417263; "
          f"{KIT}", "ilsvrc2012: n90128845, n90417263"),
    refuses("a devkit of other synsets", f"{{train,val}}/{{n01440764,n01443537}}/1.JPEG; {KIT}", "n01440764"),
    reads("a series from 1", "train-00000{1..3}.tar: 1.jpg=cat 2.jpg=dog > train", "webdataset: cat, dog"),
    reads("trainval", "trainval-000000.tar: 1.jpg=cat 2.jpg=dog > train", "webdataset: cat, dog"),
    refuses("two words of splits", "train-test-000000.tar: 1.jpg=cat 2.jpg=dog", "train-test-000000.tar"),
    reads("tables with marks of Windows", "img/1.jpg > train =cat; img/2.jpg > train =dog; "
          "l.csv <- \ufeffid,label\r|1,cat\r|2,dog\r|", "labels: cat, dog", labels="l.csv"),
    reads("semicolons", "img/1.jpg > train =cat; img/2.jpg > train =dog; l.csv <- id;label|1;cat|2;dog",
          "labels: cat, dog", labels="l.csv"),
    refuses("lost zeros", "img/00{1,2}.jpg; l.csv <- id,label|1,cat|2,dog", "img/001.jpg", labels="l.csv"),
    refuses("an empty label", "img/{1,2}.jpg; l.csv <- id,label|1,cat|2,", "img/2.jpg", labels="l.csv"),
    refuses("pictures in RAW and a table", "{1,2}.jpg; train.csv <- id,label|1,cat|2,dog", "--labels", "train.csv"),
    refuses("two links to one folder", "{cat,dog}/1.jpg; kitty -> cat", "cat", "second link"),
    reads("one number twice", "{01,1,2}/1.jpg > train 0", "class-folders: 01, 1, 2", "01 and 1"),
    refuses("numbers to train, words to validate", "train-0.tar: 1.jpg=1 2.jpg=2; val-0.tar: 1.jpg=cat", "cat", "1"),
    reads("snapshots of a server", "{cat,dog}/1.jpg > train 0; #snapshot/cat/1.jpg; @Recently-Snapshot/cat/2.jpg",
          "class-folders: cat, dog", "#snapshot"),
    reads("documents beside the classes", "{cat,dog}/1.jpg > train 0; docs/1.md; scripts/1.py",
          "class-folders: cat, dog", "docs"),
    reads("splits one folder deeper", "images/train/1.jpg > train =cat; images/train/2.jpg > train =dog; "
          "images/test/9.jpg > test -; l.csv <- id,label|1,cat|2,dog", "labels: cat, dog", labels="l.csv"),
    refuses("a doubtful split one folder deeper", "images/{train,eval}/1.jpg; l.csv <- 1.jpg,cat|2.jpg,dog",
            "eval", labels="l.csv"),
    refuses("an empty split beside a table", "train/{1,2}.jpg; val/; l.csv <- 1.jpg,cat|2.jpg,dog", "val/", FLAGGED,
            labels="l.csv"),
    reads("pictures beside a split", "train/1.jpg > train =cat; more/2.jpg > train =dog; l.csv <- 1.jpg,cat|2.jpg,dog",
          "labels: cat, dog", "1 pictures in no folder of a split (train/) are of train", labels="l.csv"),
    reads("splits not alike, by name", "train/{cat,dog}/1.jpg > train 1; test_images/{cat,dog}/2.jpg > test 1; "
          "train_old/cat/3.jpg", "split-folders: cat, dog", "train_old", layout="split-folders"),
    reads("a path and a name alike", "a/1.jpg > train =dog; 1.jpg > train =cat; l.csv <- 1.jpg,cat|a/1.jpg,dog",
          "labels: cat, dog", labels="l.csv"),
    reads("labels that are names of pictures", "{1,2,3}.jpg > train =2; l.csv <- id,label|1,2|2,2|3,2", "labels: 2",
          labels="l.csv"),
    refuses("row numbers beside names", "{0,1,2,3}.jpg; l.csv <- ,id,label|0,1,cat|1,2,dog|2,3,cat|3,4,dog",
            "more than one column", "id", labels="l.csv"),
    refuses("row numbers beside names of other files", "{0,1}.jpg; l.csv <- ,file,label|0,7.png,cat|1,8.png,dog",
            "7.png is not in RAW; correct column 2, or remove it", labels="l.csv"),
    refuses("a first row of no picture", "{1,2}.jpg; l.csv <- 77.jpg,cat|1.jpg,cat|2.jpg,dog", "77.jpg", FLAGGED,
            labels="l.csv"),
    refuses("a label of -1", "{1,2}.jpg; l.csv <- 1.jpg,0|2.jpg,-1", "2.jpg", FLAGGED, labels="l.csv"),
    refuses("parts and a table", "HAM10000_images_part_{1,2}/{a,b}.jpg; metadata.csv <- image_id,dx|a,nv|b,mel",
            "HAM10000_images_part_1", "--labels", "--layout class-folders"),
    refuses("pictures and their masks", "{JPEGImages,SegmentationClass,Annotations}/{1,2}.png",
            "JPEGImages", "--labels"),
    refuses("pictures and masks in splits", "{train,val}/{images,masks}/1.png", "images/", "--labels",
            "--layout split-folders"),
    reads("a class called images", "{train,val}/{images,cat}/1.png > * 1", "split-folders: cat, images",
          layout="split-folders"),
    reads("masks that are classes", "{with_mask,without_mask,mask}/1.jpg > train 0",
          "class-folders: mask, with_mask, without_mask"),
    reads("numbered classes", "class_{1,2,10}/1.jpg > train 0", "class-folders: class_1, class_10, class_2"),
    refuses("a sample submission before the table of labels", "train/{1,2}.jpg; test/3.jpg; train.csv <- 1,cat|2,dog; "
            "sample_submission.csv <- 3,cat", "--labels RAW/train.csv"),
    refuses("a column of splits", "{1,2}.jpg; l.csv <- image,label,split|1,0,train|2,1,Val",
            "column 3 has splits", labels="l.csv"),
    reads("a column of splits beside folders", "train/1.jpg > train =0; val/2.jpg > val =0; "
          "l.csv <- image,label,split|1,0,train|2,0,val", "labels: 0", labels="l.csv"),
    refuses("a table of test pictures named as others", "{train,test}/{1,2}.jpg; test.csv <- 1.jpg,0|2.jpg,1",
            "2 pictures have no label in it: train/1.jpg", labels="test.csv"),
    refuses("an empty table", "{1,2}.jpg; l.csv <- ", "l.csv", "it is empty", labels="l.csv"),
    refuses("a table of ragged rows", "{1,2}.jpg; l.csv <- 1.jpg,cat|2.jpg,dog,black", "1 rows of 3", labels="l.csv"),
    refuses("a table of one endless line", f"1.jpg; l.csv <- 1.jpg {'x' * 200_000}", "1 rows of 1", labels="l.csv"),
    refuses("an infinite label", '1.jpg; l.jsonl <- {"i": "1.jpg", "label": 1e400}', "infinite", labels="l.jsonl"),
    refuses("half a surrogate pair", '1.jpg; l.jsonl <- {"i": "1.jpg", "c": "\\ud83d"}', "no JSON", labels="l.jsonl"),
    refuses("a JSON list", '1.jpg; l.json <- [["1.jpg", "cat"]]', "l.json", "no JSON object a line", labels="l.json"),
    refuses("a table and no picture", "notes.txt; l.csv <- 1.jpg,0|2.jpg,1", "not the layout labels", labels="l.csv"),
    refuses("a table and another layout", "{cat,dog}/1.jpg; l.csv <- 1.jpg,0", "--labels", "--layout class-folders",
            labels="l.csv", layout="class-folders"),
    # ---- found in review
    refuses("an empty synset folder", "n01440764.tar: 1.JPEG; n01443537/", "n01443537", FLAGGED),
    refuses("Tiny ImageNet, a class without pictures", TINY.replace("wnids.txt <- ", "wnids.txt <- n00000001|") + NOTED,
            "n00000001", FLAGGED),
    refuses("Tiny ImageNet, two labels of one picture", TINY + NOTED + "|val_0.JPEG\tn01440764", "val_0.JPEG", "two"),
    reads("Tiny ImageNet, val half moved", TINY + NOTED + "; val/n01440764/images/val_1.JPEG > val =n01440764",
          f"tiny-imagenet: {WNIDS}"),
    refuses("shards beside those in train", "train/000000.tar: 1.jpg=cat 2.jpg=dog; val-000000.tar: 1.jpg=cat",
            "val-000000.tar", FLAGGED),
    refuses("val still packed", "train/{cat,dog}/1.jpg; val.zip", "val.zip", FLAGGED),
    reads("flat WNID files and a folder", "n01440764_1.JPEG > train =n01440764; n01443537_2.JPEG > train =n01443537; "
          "n01484850/{1,2}.JPEG", f"flat: {WNIDS}", "2 × picture in a folder beside the flat files"),
    reads("names of the hub of 2022", "data/train-0000{0,1}-of-00002-93b885adfe0da089.parquet: 1.jpg=0 2.jpg=1 > train",
          "parquet: 0, 1"),
    reads("whole numbers of pandas", "1.jpg > train =10; 2.jpg > train =2; l.csv <- id,label|1,10.0|2,2.0",
          "labels: 2, 10", labels="l.csv"),
    refuses("a label of pandas for none", "{1,2}.jpg; l.csv <- id,label|1,10.0|2,nan", "2.jpg", FLAGGED,
            labels="l.csv"),
    refuses("fastai's column", "{1,2}.jpg; l.csv <- name,label,is_valid|1.jpg,a,True|2.jpg,b,False", "column 3",
            labels="l.csv"),
    refuses("a split that the folders contradict", "train/{1,2}.jpg; l.csv <- name,label,split|1.jpg,a,val|2.jpg,b,val",
            "column 3", "train/1.jpg", labels="l.csv"),
    refuses("captions", "{00..24}.jpg; l.csv <- file,text|" + "|".join(f"{n:02d}.jpg,a cat no. {n}" for n in range(25)),
            "text", "of its own", labels="l.csv"),
    reads("numbers and words", "{1,2,10,rest}/1.jpg > train 0", "class-folders: 1, 10, 2, rest", "numbers and words"),
    refuses("a name of val in train", "train/{train,val}-00000.parquet: 1.jpg=0 2.jpg=1", "train/val-00000.parquet"),
    refuses("a split below data", "data/train-00000.parquet: 1.jpg=0 2.jpg=1; data/val/0000.parquet: 1.jpg=0",
            "data/val/0000.parquet"),
    refuses("a stem that RAW lacks, first", "{1,2}.jpg; l.csv <- x7,cat|1,cat|2,dog", "x7", FLAGGED, labels="l.csv"),
    refuses("depth of shards", TRAIN, "--class-depth", "webdataset", class_depth=2),
]  # fmt: skip


@pytest.mark.parametrize("row", [*FOLDERS, *FILES, *NEAR], ids=lambda row: row.name)
def test_a_tree_is_read_rightly_or_refused(row: Row, tmp_path: Path):
    truth, options = plant(tmp_path / "raw", row.files), dict(row.options)
    raw = tmp_path / "raw" / options.pop("below", "")
    if "labels" in options:
        options["labels"] = raw / options["labels"]
    try:
        sources = find_sources(raw, **options)
    except UserError as error:
        assert row.refusal, f"is refused: {error}"
        text = str(error).replace(str(raw), "RAW")
        assert "\n" not in text
        assert missing(row.refusal, text) == [], text
        return
    below = f"{row.options['below']}/" if "below" in row.options else ""
    read = {image.path: (image.split, image.wnid) for image in sources.images}
    assert row.layout, f"is read as {sources.name}: {read}"
    assert read == {path.removeprefix(below): home for path, home in truth.items() if path.startswith(below)}
    assert [record.wnid for record in sources.classes] == [*row.classes]
    assert [record.label for record in sources.classes] == [*range(len(row.classes))]
    assert sources.name == row.layout
    lines = [sources.layout, *sources.notes, *sources.ignored.lines()]
    assert missing(row.says, "\n".join(lines)) == [], lines
    assert len(lines) < 9  # by kind, and not by name


def test_one_file_of_a_series_may_be_all_of_raw(tmp_path: Path):
    name = "train-00000-of-00003.parquet"
    plant(tmp_path, f"{name}: 1.jpg=0 2.jpg=1")
    assert {image.name: image.wnid for image in find_sources(tmp_path / name).images} == {"1.jpg": "0", "2.jpg": "1"}
    with pytest.raises(UserError, match=r"missing: train-00001-of-00003\.parquet"):
        find_sources(tmp_path)


def test_every_layout_has_a_tree():
    assert {row.layout for row in FOLDERS + FILES} >= set(LAYOUTS)


def test_the_class_may_be_the_deepest_folder(tmp_path: Path):
    """--class-depth last, by the command line: labels are ranks of the paths."""
    folders = ["train/a/abbey", "train/c/canyon", "train/c/canyon/rocky", "val/a/abbey"]
    draw(tmp_path / "raw", folders)
    result = build(tmp_path / "raw", tmp_path / "out", "--size", 32, "--workers", 1, "--class-depth", "last")
    assert result.exit_code == 0, result.output
    built = manifest.load(tmp_path / "out")
    assert [record.wnid for record in built.classes] == ["a/abbey", "c/canyon", "c/canyon/rocky"]
    assert sorted(built.samples("train")["label"]) == [0, 0, 1, 1, 2, 2]
    assert [*built.samples("val")["label"]] == [0, 0]


def test_a_build_says_how_it_read_raw(tmp_path: Path):
    """Layout, order of labels, and the first and last classes: of the numbers 2 … 10, the last has the label 8."""
    draw(tmp_path / "raw", [f"{split}/{n}" for n in range(2, 11) for split in ("train", "val")])
    line = (tmp_path / "raw", tmp_path / "out", "--size", 32, "--workers", 1, "--dry-run")
    text = build(*line).output
    assert missing(("split-folders", "folder…", "number…"), text) == []
    for label in (0, 1, 2, 6, 7, 8):
        assert re.search(rf"^\s*{label}\s+{label + 2}\b.*\b2\b.*\b2\b", text, re.MULTILINE), text
    plan = json.loads(build(*line, "--json").stdout.splitlines()[0])
    rows = [[*row.values()] if isinstance(row, dict) else row for row in plan["table"]]
    assert [row[:2] for row in rows] == [[label, str(label + 2)] for label in (0, 1, 2, 6, 7, 8)]
    assert plan["gives"]


def draw(raw: Path, folders: list[str]) -> None:
    """Put two pictures into each folder."""
    for folder in folders:
        (raw / folder).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            picture(f"{folder}{i}", 48, 40).save(raw / folder / f"{i}.jpg")
