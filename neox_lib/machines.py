"""The machines and links that the series and the playground assume when they estimate a time, in round numbers.

`python -m neox_lib info` measures the memory of yours; notebook 09 measures a link.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """`memory`: bytes read per second; `operations`: floating-point operations per second, in the precision below."""

    memory: float
    operations: float

    def __str__(self) -> str:
        return f"{self.memory / 1e9:.0f} GB/s, {self.operations / 1e12:.3g} trillion operations per second"


@dataclass(frozen=True)
class Link:
    """`wait`: seconds of an all-reduce that carries next to nothing; `speed`: bytes per second, in each direction."""

    wait: float
    speed: float


MACHINES = {
    "laptop": Machine(25e9, 0.4e12),  # two channels of DDR4 in practice; a handful of CPU cores in fp32
    "graphics card": Machine(900e9, 100e12),  # a large one for consumers, in fp16
    "A100": Machine(1555e9, 312e12),  # NVIDIA's data sheet, 40 GB, in fp16: 20B was trained on 96 of them
}

LINKS = {
    "NVLink": Link(10e-6, 200e9),  # between the GPUs of one machine, directly
    "PCIe 4.0": Link(40e-6, 20e9),  # over the machine's own bus
    "10 Gbit/s Ethernet": Link(500e-6, 1.2e9),  # between machines
}


def format_seconds(seconds: float) -> str:
    """A time with two digits; in minutes from 90 seconds.

    >>> format_seconds(0.0452), format_seconds(1.63), format_seconds(210.5)
    ('0.045 s', '1.6 s', '3.5 minutes')
    """
    return f"{seconds:.2g} s" if seconds < 90 else f"{seconds / 60:.2g} minutes"
