"""Splits, the order of classes, and missing files of a numbered series, as names tell them."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.cli import printable

SPLITS = ("train", "val", "test")
WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
WORDS |= {"test": "test", "testing": "test"}
UNCERTAIN = {"dev", "eval", "evaluation", "holdout"}  # of these some data sets make a validation split, others a test
# "train2017", "trainset"; what else beside the word leaves no doubt that a folder is a split
WORD = re.compile(rf"({'|'.join(sorted([*WORDS, *UNCERTAIN], key=len, reverse=True))})(set|data|images|imgs|[0-9]*)")
ADDITION = re.compile(
    r"images?|imgs?|pictures?|photos?|data|dataset|set|ds|folders?|splits?|resized|raw|full|jpe?g|png|"
    r"[0-9]+k?|(imagenet|ilsvrc|cls).*"
)
# a folder of pictures of all kinds, as no class is called; numbered, if all folders are called alike
CONTAINER = re.compile(
    r"(jpeg)?images?|imgs?|pictures|masks|annotations|labels|ground_?truth|segmentation(s|class|object)"
)
PART = re.compile(r"(.*[^a-z])?(part|images?|imgs?|pictures|batch|chunk|archive)[^a-z0-9]*[0-9]+")
NUMBER = re.compile(r"-?[0-9]{1,255}")
OF = re.compile(r"(.*?)([0-9]+)-of-([0-9]+)(?:-[0-9a-f]{16})?(.*)")  # the hub adds a hash
NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)")


class Spelled(NamedTuple):
    """A name that has a split's word in it."""

    splits: frozenset[str]  # "" for an uncertain word; more than one: doubtful
    pattern: str  # the name with * for the word: equal for the splits of one data set
    certain: bool  # nothing else is in the name, or only what usually is
    beside: str  # the one split whose word stands beside a number, else ""


def normal(name: str) -> str:
    """Return a class name in Unicode's NFC, in which equal looks are equal; bytes that are not UTF-8 as \\xNN."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def in_order(names: Iterable[str]) -> list[str]:
    """Return distinct names in the order of their labels: by number if all are numbers, else by code points."""
    distinct = set(names)
    if are_numbers(distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def are_numbers(names: Iterable[str]) -> bool:
    return all(NUMBER.fullmatch(name) for name in names)


def spelled(name: str) -> Spelled | None:
    """Return what a name without its extension tells of splits; None where no word in it is a split's.

    Only whole words count: those between other signs than letters and digits, or where small letters turn to capitals.
    """
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).casefold())
    matches = {i: match for i, word in enumerate(words) if (match := WORD.fullmatch(word))}
    if not matches:
        return None
    splits = {i: WORDS.get(match[1], "") for i, match in matches.items()}
    pattern = "_".join("*" + matches[i][2] if i in matches else word for i, word in enumerate(words))
    certain = all(i in matches or not word or ADDITION.fullmatch(word) for i, word in enumerate(words))
    numbers = {i for i, word in enumerate(words) if word.isdecimal()}
    near = {i for i in splits if {i - 1, i + 1} & numbers}
    beside = {splits[j] for i in near for j in (i - 1, i, i + 1) if j in splits}  # train-test-000: no one split
    return Spelled(frozenset(splits.values()), pattern, certain, beside.pop() if len(beside) == 1 else "")


def folder_splits(names: Iterable[str], forced: bool = False) -> tuple[dict[str, str], str]:
    """Return folder name → split, and why that is in doubt, "" if it is not.

    A name counts that is a split's word with no more than usual additions, in any case: Train, test_images.
    Another, seg_train, counts only beside one like it for another split; else it may be a class, bullet_train.
    `forced`: the user names the layout; then splits may be spelled in different ways, and the rest is no split.
    """
    every = {name: about for name in names if (about := spelled(name))}
    splits_of_pattern: dict[str, set[str]] = defaultdict(set)
    for about in every.values():
        splits_of_pattern[about.pattern] |= about.splits
    counting = {x: about for x, about in every.items() if about.certain or len(splits_of_pattern[about.pattern]) > 1}
    splits = {name: min(about.splits) if len(about.splits) == 1 else "" for name, about in counting.items()}
    for name, split in splits.items():
        if not split:
            return splits, f"{name}/: names no one split (train, val or test); rename it"
    listed = ", ".join(f"{name}/" for name in splits)
    others = [f"{name}/" for name in every if name not in splits]
    if splits and others and not forced:
        return splits, f"{listed}: name splits, and {', '.join(others)} might; rename, or name the layout by --layout"
    if len(set(splits.values())) != len(splits):
        return splits, f"{listed}: two folders for one split; rename or remove one"
    if len({about.pattern for about in counting.values()}) > 1 and not forced:
        return splits, f"{listed}: name splits, but not alike; rename, or name the layout by --layout"
    return splits, ""


def containers(names: Iterable[str]) -> list[str]:
    """Return the names of folders that tell of pictures, and of no class: images, masks, NAME_images_part_1."""
    names = list(names)
    alike = len({re.sub("[0-9]+", "", name) for name in names}) == 1
    return [x for x in names if CONTAINER.fullmatch(x.casefold()) or (alike and PART.fullmatch(x.casefold()))]


def file_splits(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Return file name → split of numbered files such as shards, "" for none, and why that is in doubt, if it is.

    The word beside the number counts: test-bench-train-000.tar is of train. One elsewhere counts beside files of like
    names for other splits. A word inside another (valley-000.tar) never does.
    """
    every = {name: spelled(name.partition(".")[0]) for name in names}
    splits_of_pattern: dict[str, set[str]] = defaultdict(set)
    for about in every.values():
        if about:
            splits_of_pattern[re.sub("[0-9]+", "0", about.pattern)] |= about.splits
    splits = {}
    for name, about in every.items():
        alike = about is not None and len(splits_of_pattern[re.sub("[0-9]+", "0", about.pattern)]) > 1
        if about is None:
            splits[name] = ""
        elif about.beside:
            splits[name] = about.beside
        elif (
            len(about.splits) == 1 and "" not in about.splits and (about.certain or alike or about.splits == {"train"})
        ):
            splits[name] = next(iter(about.splits))
        else:
            readings = " or of ".join(sorted(about.splits - {""})) or "val or of test"
            return {}, f"{name}: of {readings}, or of no split? a split's word counts beside the number: train-000000"
    return splits, ""


def missing(names: Iterable[str]) -> list[str]:
    """Return the names that are missing among numbered files, at most five, and "… and N more".

    Of NAME-00001-of-00003 there must be three, from 0 or from 1 on. Of others, two or more with one number in their
    names alike, those from 0 or 1 to the last, if one begins with 0 or the first is at most 1: else they may be years.
    """
    groups: dict[tuple[str, str, int], dict[int, int]] = defaultdict(dict)  # → number: its width
    padded = set()
    for name in names:
        if match := OF.fullmatch(name):
            group, number = (match[1], f"-of-{match[3]}{match[4]}", int(match[3])), match[2]
        elif match := NUMBERED.fullmatch(name):
            group, number = (match[1], match[3], 0), match[2]
        else:
            continue
        groups[group][int(number)] = len(number)
        if number[0] == "0" and len(number) > 1:
            padded.add(group)
    lacking: list[str] = []
    more = 0
    for (before, after, count), widths in groups.items():
        if not count and (before, after, count) not in padded and (len(widths) < 2 or min(widths) > 1):
            continue
        first = 0 if 0 in widths or (count and count not in widths) else min(1, min(widths))
        expected = range(first, first + count) if count else range(first, max(widths) + 1)
        more += len(expected) - sum(number in expected for number in widths)
        width = min(widths.values())
        gaps = (number for number in expected if number not in widths)
        for number in gaps:
            if len(lacking) == 5:
                break
            lacking.append(f"{before}{number:0{width}d}{after}")
    more -= len(lacking)
    return lacking + ([f"and {more:,} more"] if more else [])


def lines_of(text: str) -> list[str]:
    """Return the lines of a text: Python's splitlines would also end them at U+2028 and the like, in a name."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names for a message, and how many there are more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name, 120) for name in names[:most]) + more


def look_alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the groups of names that differ by case or blanks alone, or that are one number."""
    every = [*names]
    numbers, groups = are_numbers(every), defaultdict[str, list[str]](list)
    for name in every:
        groups[str(int(name)) if numbers else " ".join(name.casefold().split())].append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]
