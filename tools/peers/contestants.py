"""Who is measured: our own builder, the ceiling, and the builders of others."""

from dataclasses import dataclass

TORCH = "torch==2.13.0"
PILLOW = "pillow==13.0.0"


@dataclass(frozen=True)
class Contestant:
    """`module` is run as a program with a job's four words and `arguments`; see job.py."""

    name: str
    title: str
    module: str
    does: str  # beside or in place of what ours does
    arguments: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()  # exact versions; none: runs in our own environment
    advice: str = ""  # where its environment cannot be made

    @property
    def is_peer(self) -> bool:
        return bool(self.requirements)


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
        ),
        Contestant(
            "img2dataset",
            "img2dataset, Resizer and WebDatasetSampleWriter",
            "img2dataset_writer",
            "no download: fed from files; OpenCV, INTER_AREA (Lanczos where smaller); grey pictures stay grey; "
            "SHA-256 of the raw bytes, JSON per picture, parquet per shard; no statistics, index or fsync",
            requirements=(
                "img2dataset==1.47.0",
                "opencv-python-headless==4.14.0.94",
                "albumentations==1.4.24",
                "webdataset==0.2.111",
                "numpy==2.4.6",
                "pyarrow==26.0.1",
            ),
        ),
        Contestant(
            "litdata",
            "LitData, optimize",
            "litdata_optimize",
            "stock Pillow, bicubic, within its own chunk format; index of chunks; order not kept; no statistics, "
            "digests or fsync",
            requirements=("litdata==0.2.76", TORCH, "torchvision==0.28.0", PILLOW, "numpy==2.4.6"),
        ),
        Contestant(
            "webdataset",
            "WebDataset, ShardWriter with stock Pillow",
            "webdataset_writer",
            "stock Pillow, bicubic; tars and labels; no statistics, index, digests or fsync",
            requirements=("webdataset==1.0.2", PILLOW, "numpy==2.4.6"),
        ),
        Contestant(
            "ffcv",
            "FFCV, DatasetWriter",
            "ffcv_writer",
            "the longer side to 256 and no crop: fewer pixels are rescaled, encoded and stored; Pillow decodes, OpenCV "
            "rescales (INTER_AREA) and encodes; one file; no statistics, digests or fsync",
            requirements=("ffcv==1.0.2", TORCH, "opencv-python==5.0.0.93", PILLOW, "numba==0.68.1", "numpy==2.4.6"),
            advice="it is compiled: apt-get install libopencv-dev libturbojpeg0-dev pkg-config build-essential",
        ),
        Contestant(
            "opencv",
            "cuda-convnet2's recipe, OpenCV INTER_AREA",
            "opencv_area",
            "OpenCV, INTER_AREA (bicubic where smaller), JPEGs and labels in a pickle per shard; turns pictures as "
            "their EXIF says; no statistics, index, digests or fsync",
            requirements=("opencv-python-headless==5.0.0.93", "numpy==2.4.6"),
        ),
    )
}
