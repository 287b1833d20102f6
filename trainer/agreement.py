"""What the processes of a job must have in common before the first step."""

import json
import socket
from collections.abc import Mapping
from typing import Any

from pipeline import UserError
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.distributed import World


def require_alike(world: World, facts: Mapping[str, Any]) -> None:
    """Raise UserError, in every process, where one's facts (JSON values by name) are not the first one's."""
    if world.size == 1:
        return
    told = [json.loads(text) for text in world.texts(json.dumps({**facts, "": socket.gethostname()}))]
    with world.raise_together():
        for rank, theirs in enumerate(told):
            for key in dict.fromkeys((*told[0], *theirs)):
                if key and theirs.get(key) != told[0].get(key):
                    raise UserError(
                        f"process {rank}, on {theirs['']}, has {key} {theirs.get(key)}, and the first process, on "
                        f"{told[0]['']}, has {told[0].get(key)}; start all processes alike"
                    )


def shared(world: World, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The first process's checkpoint in all, where it has one; its tensors are in the first alone."""
    if world.size == 1:
        return checkpoint
    text = world.texts(checkpoints.described(checkpoint) if world.is_main and checkpoint else "")[0]
    return checkpoint if world.is_main or not text else checkpoints.without_tensors(text)
