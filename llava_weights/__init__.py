"""Apply LLaVA deltas, merge LoRAs, convert layouts and prove the result, one pass over the bytes, in little memory.

    import llava_weights as lw

    model = lw.apply_delta("llama-13b", "LLaVA-13b-delta-v0")
    lw.execute(lw.make_plan(model), "LLaVA-13B-v0")

A checkpoint is given as what `open_checkpoint` returns, or as its path, its name on the Hub or its address. Names are imported on
first use (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:  # what type checkers see; a test holds it against the table below
    from .adapter import Adapter as Adapter
    from .adapter import Module as Module
    from .adapter import open_adapter as open_adapter
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import Origin as Origin
    from .checkpoint import Source as Source
    from .checkpoint import Step as Step
    from .checkpoint import open_checkpoint as open_checkpoint
    from .comparison import Difference as Difference
    from .comparison import TensorDifference as TensorDifference
    from .comparison import diff as diff
    from .conversion import convert as convert
    from .delta import apply_delta as apply_delta
    from .delta import make_delta as make_delta
    from .errors import HubError as HubError
    from .errors import InputError as InputError
    from .errors import Interrupted as Interrupted
    from .errors import LlavaWeightsError as LlavaWeightsError
    from .errors import MismatchError as MismatchError
    from .errors import OutputError as OutputError
    from .errors import Terminated as Terminated
    from .errors import UsageError as UsageError
    from .errors import VerificationError as VerificationError
    from .events import Event as Event
    from .events import Note as Note
    from .events import Progress as Progress
    from .events import ReadingBack as ReadingBack
    from .events import ShardDone as ShardDone
    from .events import Started as Started
    from .findings import Finding as Finding
    from .forward import Probe as Probe
    from .lora import merge_lora as merge_lora
    from .low_rank import Arithmetic as Arithmetic
    from .plan import Plan as Plan
    from .plan import Settings as Settings
    from .plan import Shard as Shard
    from .plan import make_plan as make_plan
    from .portions import Portion as Portion
    from .portions import PortionReport as PortionReport
    from .portions import execute_portion as execute_portion
    from .portions import to_portion as to_portion
    from .reference_file import Recorded as Recorded
    from .reference_file import Recording as Recording
    from .reference_file import read_recording as read_recording
    from .reference_file import record as record
    from .smoke import Row as Row
    from .smoke import Smoke as Smoke
    from .smoke import smoke_test as smoke_test
    from .tensors import LazyTensor as LazyTensor
    from .verification import Verification as Verification
    from .verification import checksum as checksum
    from .verification import verify as verify
    from .write import Report as Report
    from .write import execute as execute

_FROM = {
    "checkpoint": ("Checkpoint", "Origin", "Source", "Step", "open_checkpoint"),
    "tensors": ("LazyTensor",),
    "delta": ("apply_delta", "make_delta"),
    "adapter": ("Adapter", "Module", "open_adapter"),
    "lora": ("merge_lora",),
    "low_rank": ("Arithmetic",),
    "conversion": ("convert",),
    "plan": ("Plan", "Settings", "Shard", "make_plan"),
    "write": ("Report", "execute"),
    "portions": ("Portion", "PortionReport", "execute_portion", "to_portion"),
    "verification": ("Verification", "checksum", "verify"),
    "findings": ("Finding",),
    "forward": ("Probe",),
    "comparison": ("Difference", "TensorDifference", "diff"),
    "smoke": ("Row", "Smoke", "smoke_test"),
    "reference_file": ("Recorded", "Recording", "read_recording", "record"),
    "events": ("Event", "Note", "Progress", "ReadingBack", "ShardDone", "Started"),
    "errors": (
        "HubError",
        "InputError",
        "Interrupted",
        "LlavaWeightsError",
        "MismatchError",
        "OutputError",
        "Terminated",
        "UsageError",
        "VerificationError",
    ),
}
_HOME = {name: module for module, names in _FROM.items() for name in names}
__all__ = sorted(_HOME)

if not TYPE_CHECKING:  # else every misspelt name would be of the type Any

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)

    def __dir__() -> list[str]:
        return __all__
