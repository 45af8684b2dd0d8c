"""What a checkpoint says besides its tensors: one dataclass, so that who writes and who reads mean the same keys."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from titanlite.checkpoint.folder import CheckpointError


@dataclass(frozen=True)
class Meta:
    """All of it is JSON-able; it lies in the checkpoint's manifest."""

    step: int
    config: dict[str, dict[str, Any]]
    """Of the run that saved it, by section and key."""
    tokenizer: str = ""
    """Fingerprint, or its beginning, of the tokenizer that the model was trained with; empty: not known."""
    trained_targets: int = 0
    """Target tokens since step 0."""
    skipped_steps: int = 0
    """Updates left out since step 0, because loss or gradient was not finite."""
    cursor: dict[str, Any] | None = None
    """Of the token stream, after `step`; None: at its start."""
    ledger: dict[str, int] = field(default_factory=dict)
    """What became of the tokens of all sources together, see data/stream.py."""
    corpus: dict[str, Any] = field(default_factory=dict)
    """The manifest of the corpus, without that of each source."""
    layout: str = "an unknown layout"
    """The mesh, in words."""
    rng: str = ""
    """State of torch's CPU generator, in hex; empty: that of a new process."""
    imported: str = ""
    """Where the weights come from, where no run of titanlite made them."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, path: str, content: Mapping[str, Any]) -> "Meta":
        """What checkpoint `path` says. Keys of later versions are passed over; versions before this class wrote the
        tokenizer's fingerprint into the cursor, or of an imported model into the corpus.

        Raises CheckpointError where step or config are missing.
        """
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        if "tokenizer" not in known:
            stream = (content.get("cursor") or {}).get("stream", {})
            known["tokenizer"] = stream.get("tokenizer") or content.get("corpus", {}).get("tokenizer", "")
        if missing := [name for name in ("step", "config") if name not in known]:
            raise CheckpointError(f"{path}: its manifest holds no usable {' and no '.join(missing)}")
        return cls(**known)
