"""What the processes of a job must have in common before the first step."""

import json
import socket
from collections.abc import Mapping
from typing import Any

from pipeline import UserError
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.processes import Processes


def require_alike(job: Processes, facts: Mapping[str, Any]) -> None:
    """Raise UserError, in every process, where one's facts (JSON values by name) are not the first one's."""
    if job.count == 1:
        return
    told = [json.loads(text) for text in job.texts(json.dumps({**facts, "": socket.gethostname()}))]
    with job.together():
        for rank, theirs in enumerate(told):
            for key in dict.fromkeys((*told[0], *theirs)):
                if key and theirs.get(key) != told[0].get(key):
                    raise UserError(
                        f"process {rank}, on {theirs['']}, has {key} {theirs.get(key)}, and the first process, on "
                        f"{told[0]['']}, has {told[0].get(key)}; start all processes alike"
                    )


def shared(job: Processes, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The first process's checkpoint in all, where it has one; its tensors are in the first alone."""
    if job.count == 1:
        return checkpoint
    text = job.texts(checkpoints.described(checkpoint) if job.first and checkpoint else "")[0]
    return checkpoint if job.first or not text else checkpoints.without_tensors(text)
