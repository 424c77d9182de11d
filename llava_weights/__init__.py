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
    from .checkpoint.checkpoint import Checkpoint as Checkpoint
    from .checkpoint.checkpoint import CheckpointSource as CheckpointSource
    from .checkpoint.checkpoint import Origin as Origin
    from .checkpoint.checkpoint import Step as Step
    from .checkpoint.checkpoint import open_checkpoint as open_checkpoint
    from .checkpoint.fingerprint import record_fingerprint as record_fingerprint
    from .checkpoint.inspect import Inspection as Inspection
    from .checkpoint.inspect import inspect as inspect
    from .checkpoint.part_folders import PartFolders as PartFolders
    from .checks.diff import Difference as Difference
    from .checks.diff import TensorDifference as TensorDifference
    from .checks.diff import diff as diff
    from .checks.repair import Repair as Repair
    from .checks.repair import RepairedFile as RepairedFile
    from .checks.repair import repair as repair
    from .checks.verify import Verification as Verification
    from .checks.verify import checksum as checksum
    from .checks.verify import verify as verify
    from .cli.progress import ProgressBar as ProgressBar
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
    from .events import Listener as Listener
    from .events import Note as Note
    from .events import Progress as Progress
    from .events import ReadingBack as ReadingBack
    from .events import ShardDone as ShardDone
    from .events import Started as Started
    from .findings import Finding as Finding
    from .formats.gguf import GgufFile as GgufFile
    from .formats.gguf import GgufKey as GgufKey
    from .smoke.forward import Probe as Probe
    from .smoke.logits import Limits as Limits
    from .smoke.logits import Row as Row
    from .smoke.logits import Smoke as Smoke
    from .smoke.logits import smoke_test as smoke_test
    from .smoke.recording import Recorded as Recorded
    from .smoke.recording import Recording as Recording
    from .smoke.recording import read_recording as read_recording
    from .smoke.recording import record as record
    from .storage.places import RemotePath as RemotePath
    from .storage.reading import SourceFile as SourceFile
    from .tensors.lazy import LazyTensor as LazyTensor
    from .tensors.low_rank import Arithmetic as Arithmetic
    from .transforms.adapter import Adapter as Adapter
    from .transforms.adapter import Module as Module
    from .transforms.adapter import open_adapter as open_adapter
    from .transforms.convert import convert as convert
    from .transforms.convert_lora import convert_lora as convert_lora
    from .transforms.delta import apply_delta as apply_delta
    from .transforms.delta import make_delta as make_delta
    from .transforms.lora import Adapters as Adapters
    from .transforms.lora import AdapterSource as AdapterSource
    from .transforms.lora import merge_lora as merge_lora
    from .transforms.which_base import Candidate as Candidate
    from .transforms.which_base import WhichBase as WhichBase
    from .transforms.which_base import which_base as which_base
    from .write.execute import Report as Report
    from .write.execute import execute as execute
    from .write.plan import Plan as Plan
    from .write.plan import Settings as Settings
    from .write.plan import Shard as Shard
    from .write.plan import make_plan as make_plan
    from .write.portions import Portion as Portion
    from .write.portions import PortionReport as PortionReport
    from .write.portions import execute_portion as execute_portion
    from .write.portions import to_portion as to_portion

_FROM = {
    "checkpoint.checkpoint": (
        "Checkpoint",
        "Origin",
        "CheckpointSource",
        "Step",
        "open_checkpoint",
    ),
    "checkpoint.fingerprint": ("record_fingerprint",),
    "tensors.lazy": ("LazyTensor",),
    "formats.gguf": (
        "GgufFile",
        "GgufKey",
    ),
    "transforms.delta": (
        "apply_delta",
        "make_delta",
    ),
    "checkpoint.part_folders": ("PartFolders",),
    "transforms.adapter": (
        "Adapter",
        "Module",
        "open_adapter",
    ),
    "transforms.lora": (
        "AdapterSource",
        "Adapters",
        "merge_lora",
    ),
    "transforms.which_base": (
        "Candidate",
        "WhichBase",
        "which_base",
    ),
    "tensors.low_rank": ("Arithmetic",),
    "transforms.convert": ("convert",),
    "transforms.convert_lora": ("convert_lora",),
    "write.plan": (
        "Plan",
        "Settings",
        "Shard",
        "make_plan",
    ),
    "write.execute": (
        "Report",
        "execute",
    ),
    "write.portions": (
        "Portion",
        "PortionReport",
        "execute_portion",
        "to_portion",
    ),
    "checks.repair": (
        "Repair",
        "RepairedFile",
        "repair",
    ),
    "checks.verify": (
        "Verification",
        "checksum",
        "verify",
    ),
    "findings": ("Finding",),
    "smoke.forward": ("Probe",),
    "checks.diff": (
        "Difference",
        "TensorDifference",
        "diff",
    ),
    "smoke.logits": (
        "Limits",
        "Row",
        "Smoke",
        "smoke_test",
    ),
    "smoke.recording": (
        "Recorded",
        "Recording",
        "read_recording",
        "record",
    ),
    "events": (
        "Event",
        "Listener",
        "Note",
        "Progress",
        "ReadingBack",
        "ShardDone",
        "Started",
    ),
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
    "checkpoint.inspect": (
        "Inspection",
        "inspect",
    ),
    "cli.progress": ("ProgressBar",),
    "storage.places": ("RemotePath",),
    "storage.reading": ("SourceFile",),
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
