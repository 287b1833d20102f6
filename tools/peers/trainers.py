"""Who is measured by `train`: our step in its forms, the plain network, torchvision's, and what bounds them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trainer:
    """`than`: whom its rate is divided by; `loads`: whether our loader feeds it; `step`: the row without a loader."""

    name: str
    title: str
    does: str
    than: tuple[str, ...] = ()
    loads: bool = False
    step: str = ""


MATRIX, LOADER, COLUMNS, FED, GROUPED, PLAIN, PLAIN_FED = (
    "matrix",
    "loader",
    "columns",
    "fed",
    "grouped",
    "torchvision",
    "torchvision-fed",
)
TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer(
            MATRIX,
            "ceiling: a matrix product",
            "two large square matrices in that precision, on the first device; shares are of its rate on every device",
        ),
        Trainer(
            LOADER,
            "supply: the loader alone",
            "the batches of a run of this recipe, on its devices; nobody looks at them",
            loads=True,
        ),
        Trainer(
            COLUMNS,
            "Penstock's step, synthetic tensors",
            "a run's own step: dropout masks, forward, backward, new weights, watch; one batch of random numbers",
            (GROUPED, PLAIN),
        ),
        Trainer(
            FED,
            "Penstock's step, fed by the loader",
            "the same, each batch from the loader",
            (COLUMNS,),
            loads=True,
            step=COLUMNS,
        ),
        Trainer(
            GROUPED,
            "the plain grouped network, synthetic tensors",
            "the same step of the same network whole on the first device, with grouped convolutions and no columns",
        ),
        Trainer(
            PLAIN,
            "torchvision's AlexNet in plain torch, synthetic tensors",
            "another network: 64, 192, 384, 256, 256 maps, no LRN, no groups; nn.CrossEntropyLoss, torch.optim.SGD; "
            "on the first device",
        ),
        Trainer(
            PLAIN_FED,
            "torchvision's AlexNet in plain torch, fed by the loader",
            "the same, each batch from our loader, with the recipe's views",
            (PLAIN,),
            loads=True,
            step=PLAIN,
        ),
    )
}
