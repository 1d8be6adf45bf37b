"""Which process of how many this is, when another launcher than torchrun started it: srun, mpirun or mpiexec."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from config.usage import UsageError

# Launcher: variables of the number of processes, of the rank, of the rank on this machine, and of those there are here.
_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec (PMI)": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def read_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Gives torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) to a process that another
    launcher started; torchrun's own, or those that a user set, stay.

    Raises:
        UsageError: several processes that cannot find each other: each would train alone, all into one folder; or one
            that takes itself for a part of a run that is not there.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
        if not all(text and text.isdecimal() for text in (rank, size)) or int(rank) >= int(size):
            raise UsageError(
                f"the environment has RANK {rank} and WORLD_SIZE {size}, which make no run: unset both, or start the "
                "processes with torchrun, which sets them"
            )
        return
    for launcher, (size, rank, local_rank, local_size) in _LAUNCHERS.items():
        if int(environment.get(size, 1)) <= 1:
            continue
        found = {"WORLD_SIZE": environment[size], "RANK": environment.get(rank)}
        found["LOCAL_RANK"] = environment.get(local_rank)
        alone = environment.get(local_size) == environment[size]
        if launcher == "srun":
            host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
            number = environment.get("SLURM_JOB_ID")
        else:  # of the processes on one machine, the launcher's daemon is the common parent
            host, number = ("127.0.0.1", str(os.getppid())) if alone else (None, None)
        found["MASTER_ADDR"] = environment.get("MASTER_ADDR", host)
        found["MASTER_PORT"] = environment.get("MASTER_PORT", number and str(20000 + int(number) % 20000))
        if missing := [name for name, value in found.items() if not value]:
            raise UsageError(
                f"{launcher} started {environment[size]} processes, which cannot find each other: set "
                f"{', '.join(missing)} for all, or start them with torchrun (scripts/train.sh, scripts/slurm.sh)"
            )
        environment.update(found)
        return


def first_host(nodes: str) -> str | None:
    """The first of a Slurm list of nodes: ``gpu[07-09,12],login`` -> ``gpu07``; None for an empty one."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return match and "".join(part or "" for part in match.groups())
