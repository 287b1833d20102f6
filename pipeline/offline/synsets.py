"""Synsets: tars and folders named by a wnid, each of them one class; and ImageNet Fall 2011, which is nothing else."""

import re
from collections.abc import Iterator

from pipeline.offline.archives import first_name
from pipeline.offline.raw import Entry, Folder, LeftOut, RawImage, Sources, is_picture, kind_of, pictures, ranked
from pipeline.offline.scans import Scans

WNID = re.compile(r"n[0-9]{8}")
WNID_TAR = re.compile(r"(?:.*/)?(n[0-9]{8})\.tar")


def archive_entries(folder: Folder, name: str, below: str, scans: Scans, left_out: LeftOut) -> Iterator[Entry]:
    """Every picture of one archive, from its listing; `below` is the archive's folder in RAW."""
    archive = folder.path / name
    listing = scans.listing(archive)
    left_out.merge(listing.left_out)
    file, path = str(archive), f"{below}/{name}" if below else name
    for member, offset, size in listing:
        if is_picture(member):
            yield f"{path}/{member}", file, offset, size
        else:
            left_out.add(kind_of(member), f"{name}/{member}")


def add_archive(sources: Sources, folder: Folder, name: str, split: str, scans: Scans) -> None:
    """Add a tar of synset tars. What lies in no synset tar is left out."""
    listing = scans.listing(folder.path / name, nested=True)
    sources.ignored.merge(listing.left_out)
    file = str(folder.path / name)
    before, wnid = "", ""  # of the tar inside, so that the images of a class share one string
    for member, offset, size in listing:
        tar = member.partition(".tar/")[0]
        if tar != before:
            found = WNID_TAR.fullmatch(f"{tar}.tar")
            before, wnid = tar, found[1] if found else ""
        if not wnid:
            sources.ignored.add("member outside the synset tars", f"{name}/{member}")
        elif not is_picture(member):
            sources.ignored.add(kind_of(member), f"{name}/{member}")
        else:
            sources.images.append(RawImage(split, f"{name}/{member}", wnid, file, offset, size))


def add_folder(sources: Sources, folder: Folder, below: str, split: str, scans: Scans) -> None:
    """Add the synset tars and synset folders in `folder`, which is `below` in RAW; of a pair of them the tar."""
    tars = {name.removesuffix(".tar"): name for name in folder.files if WNID_TAR.fullmatch(name)}
    folders = [name for name in folder.folders if WNID.fullmatch(name)]
    for wnid, name in tars.items():
        for path, file, offset, size in archive_entries(folder, name, below, scans, sources.ignored):
            sources.images.append(RawImage(split, path, wnid, file, offset, size))
    for wnid in folders:
        path = f"{below}/{wnid}" if below else wnid
        if wnid in tars:
            sources.ignored.add("folder beside its synset tar", path)
            continue
        for picture, file, offset, size in pictures(folder.path / wnid, path, sources.ignored):
            sources.images.append(RawImage(split, picture, wnid, file, offset, size))
    if below:
        folder.ignore(sources.ignored, [*tars.values(), *folders])


def has_synsets(folder: Folder) -> bool:
    return any(WNID.fullmatch(name) for name in folder.folders) or has_synset_tars(folder)


def has_synset_tars(folder: Folder) -> bool:
    return any(WNID_TAR.fullmatch(name) for name in folder.files)


def recognise(folder: Folder) -> bool:
    return has_synset_tars(folder) or _wholes(folder) != []


def read(folder: Folder, scans: Scans) -> Sources:
    """ImageNet Fall 2011: RAW holds nXXXXXXXX.tar, or tars of those; classes are the wnids."""
    sources = Sources("ImageNet's synset tars")
    wholes = [] if has_synset_tars(folder) else _wholes(folder)
    for name in wholes:
        add_archive(sources, folder, name, "train", scans)
    if wholes:
        sources.layout = f"one tar of synset tars ({', '.join(wholes)})"
    elif has_synsets(folder):
        add_folder(sources, folder, "", "train", scans)
    else:
        raise folder.misfit("fall2011", "it holds no nXXXXXXXX.tar and no tar of those")
    used = wholes or [name for name in (*folder.files, *folder.folders) if WNID.fullmatch(name.removesuffix(".tar"))]
    folder.ignore(sources.ignored, used)
    sources.classes = ranked(sources.images.wnids, {}, {})
    return sources


def _wholes(folder: Folder) -> list[str]:
    """The tars of RAW that begin with a synset tar."""
    return [name for name in folder.tars if WNID_TAR.fullmatch(first_name(folder.path / name))]
