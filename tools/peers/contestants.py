"""Who is measured by `build`: our own builder, the ceiling, and the builders of others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """`module` is run as a program with a job's words and `arguments`; see job.py and loadjob.py."""

    name: str
    title: str
    module: str
    does: str  # beside or in place of what ours does
    arguments: tuple[str, ...] = ()
    environment: str = ""  # of environments.ENVIRONMENTS; none: runs in our own
    ours: str = "penstock"  # the contestant of ours that it is compared with; none: it is one itself
    converter: str = ""  # a module that writes the pictures in its own format, once and untimed, with the same words


CEILING, OURS = "decode-encode", "penstock"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "decode",
            "ceiling: JPEG decode alone",
            "turbojpeg",
            "libjpeg-turbo through simplejpeg, from bytes in memory; nothing is rescaled, encoded or written",
            ("decode",),
        ),
        Contestant(
            CEILING,
            "ceiling: JPEG decode and encode alone",
            "turbojpeg",
            "the same, then one 256 × 256 picture, prepared beforehand, encoded at quality 95, 4:2:0",
            ("decode-encode",),
        ),
        Contestant(
            OURS,
            "Penstock, tools/build_shards.py",
            "penstock_build",
            "the whole job: decode, bicubic rescaling, crop, JPEG 95, mean image and covariance, tar, index, labels, "
            "digests of raw pictures and of files, fsync of every file, manifest",
            ours="",
        ),
        Contestant(
            "img2dataset",
            "img2dataset, Resizer and WebDatasetSampleWriter",
            "img2dataset_writer",
            "no download: fed from files; OpenCV, INTER_AREA (Lanczos where smaller); grey pictures stay grey; "
            "SHA-256 of the raw bytes, JSON per picture, parquet per shard; no statistics, index or fsync",
            environment="img2dataset",
        ),
        Contestant(
            "litdata",
            "LitData, optimize",
            "litdata_optimize",
            "stock Pillow, bicubic, within its own chunk format; index of chunks; order not kept; no statistics, "
            "digests or fsync",
            environment="litdata",
        ),
        Contestant(
            "webdataset",
            "WebDataset, ShardWriter with stock Pillow",
            "webdataset_writer",
            "stock Pillow, bicubic; tars and labels; no statistics, index, digests or fsync",
            environment="webdataset",
        ),
        Contestant(
            "ffcv",
            "FFCV, DatasetWriter",
            "ffcv_writer",
            "the longer side to 256 and no crop: fewer pixels are rescaled, encoded and stored; Pillow decodes, OpenCV "
            "rescales (INTER_AREA) and encodes; one file; no statistics, digests or fsync",
            environment="ffcv",
        ),
        Contestant(
            "opencv",
            "cuda-convnet2's recipe, OpenCV INTER_AREA",
            "opencv_area",
            "OpenCV, INTER_AREA (bicubic where smaller), JPEGs and labels in a pickle per shard; turns pictures as "
            "their EXIF says; no statistics, index, digests or fsync",
            environment="opencv",
        ),
    )
}
