"""The numbers of images and classes that a layout promises, against what is there."""

from collections import Counter

from pipeline.offline.raw import Promise, SourceError, Sources

NAMED = 5  # classes in a message; the rest is counted


def check(sources: Sources, allow_incomplete: bool, chosen: bool) -> None:
    """Compare; what differs is refused, or noted if the user allows it. `chosen`: only some classes were asked for.

    Raises:
        SourceError: one line with each difference and the classes concerned.
    """
    found = {promise.split: sources.images.per_class(promise.split) for promise in sources.promises}
    differences = [_difference(promise, found[promise.split], sources, chosen) for promise in sources.promises]
    classes = len({wnid for counts in found.values() for wnid in counts if wnid})
    if sources.promised_classes not in (0, classes) and not chosen:
        differences.append(f"{classes:,} classes have images, {sources.promised_classes:,} are promised")
    differences = [difference for difference in differences if difference]
    if differences and not allow_incomplete:
        raise SourceError(
            f"{'; '.join(differences)}; fetch what is missing, build with what is there (--allow-incomplete), or name "
            "another --layout"
        )
    sources.notes += differences


def _difference(promise: Promise, counts: Counter[str | None], sources: Sources, chosen: bool) -> str:
    """What is missing or too much in one split; empty: nothing."""
    expected = {record.wnid: promise.per_class.get(record.wnid, 0) for record in sources.classes}
    known = bool(promise.per_class)
    if known:
        wrong = [wnid for wnid in expected if counts[wnid] != expected[wnid]]
    else:
        wrong = [wnid for wnid in expected if not counts[wnid] and counts.keys() - {None}]
    images = sum(expected.values()) if chosen else promise.images
    total = counts.total()
    if not (known and wrong) and (total == images or chosen):
        return ""
    words = {record.wnid: record.words for record in sources.classes}
    named = [
        f"{wnid} ({words[wnid]}) {counts[wnid]:,}" + (f" of {expected[wnid]:,}" if known else "")
        for wnid in wrong[:NAMED]
    ]
    if len(wrong) > NAMED:
        named.append(f"{len(wrong) - NAMED:,} classes more")
    concerned = f" ({', '.join(named)})" if named else ""
    return f"{promise.part}: {total:,} images, but {promise.by} {images:,} {promise.unit}{concerned}"
