"""Who is measured by `load`: our own loader in its forms, the ceiling, and the loaders of others."""

from tools.peers.contestants import Contestant

CEILING, UINT8, COLOUR, IMAGE, IMAGENET = (
    "decode",
    "penstock-uint8",
    "penstock-colour",
    "penstock-image",
    "penstock-imagenet",
)
LOADERS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            CEILING,
            "ceiling: DALI decodes the windows alone",
            "dali_window",
            "JPEG bytes in memory, random 224 × 224 windows; no flip, reading, shuffling or labels; nothing is copied "
            "out of DALI",
            ours=UINT8,
        ),
        Contestant(
            UINT8,
            "Penstock, uint8",
            "penstock_load",
            "random window and flip; a permutation of the whole split, positioned reads, CRC-32 of every picture",
            ('{"output": "uint8"}',),
            ours="",
        ),
        Contestant(
            COLOUR,
            "Penstock, minus the mean colour",
            "penstock_load",
            "the same, minus the mean colour, with lighting",
            ('{"mean": "colour"}',),
            ours="",
        ),
        Contestant(
            IMAGE,
            "Penstock, minus the mean image (default)",
            "penstock_load",
            "the same, minus the mean image, with lighting",
            ("{}",),
            ours="",
        ),
        Contestant(
            IMAGENET,
            "Penstock, recipe imagenet",
            "penstock_load",
            "random windows of any size, resized to 224 × 224; flip; minus mean, over standard deviation",
            ('{"recipe": "imagenet"}',),
            ours="",
        ),
        Contestant(
            "synthetic",
            "synthetic: no pictures",
            "synthetic",
            "a new tensor filled with one number for each batch: what a loader without decoding would give",
            ours=IMAGE,
        ),
        Contestant(
            "dali-reader",
            "DALI, readers.webdataset",
            "dali_reader",
            "random window and flip, minus the mean colour; a shuffle buffer of 1,024 pictures, the shards mapped into "
            "memory; labels left as text; copied to torch by DALIGenericIterator",
            ours=COLOUR,
        ),
        Contestant(
            "ffcv-jpeg",
            "FFCV, the same JPEGs",
            "ffcv_load",
            "its .beton holds the JPEG bytes of the shards as they are; decodes whole pictures, then random window and "
            "flip in numba; order RANDOM, os_cache; its batches lie in memory that it uses again",
            ("jpeg",),
            environment="ffcv",
            ours=UINT8,
            converter="ffcv_convert",
        ),
        Contestant(
            "ffcv-raw",
            "FFCV, raw pixels",
            "ffcv_load",
            "its .beton holds pixels, 192 KiB a picture, warm in memory: no decoding; the rest as before",
            ("raw",),
            environment="ffcv",
            ours=UINT8,
            converter="ffcv_convert",
        ),
        Contestant(
            "webdataset",
            "WebDataset, Pillow, DataLoader",
            "webdataset_load",
            "stock Pillow decodes whole pictures; random window and flip, minus the mean colour; shards drawn at "
            "random, a shuffle buffer of 1,000 pictures; a process a core",
            environment="webdataset",
            ours=COLOUR,
        ),
        Contestant(
            "litdata",
            "LitData, Pillow, StreamingDataLoader",
            "litdata_load",
            "its chunks hold the same JPEG bytes; stock Pillow decodes whole pictures; random window and flip, minus "
            "the mean colour; a process a core",
            environment="litdata",
            ours=COLOUR,
            converter="litdata_convert",
        ),
    )
}
