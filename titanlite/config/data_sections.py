"""The sections of a titanlite config about documents, as in sections.py: those to train on, and to validate on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SourceConfig:
    """A table `[data.sources.NAME]`: one source of a mixture."""

    paths: tuple[str, ...] = ()
    """Files or globs (** for subfolders) of this source."""
    weight: float = 1.0
    """Share of this source in the rows that are trained, relative to the other weights; 0: none of them."""
    exclude: tuple[str, ...] = ()
    """As data.exclude, for the files of this source."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """As data.format, for the files of this source."""
    text_field: str = "text"
    """As data.text_field, for the files of this source."""
    max_epochs: int = 0
    """Epochs over this source after which the run ends; 0: no limit."""


@dataclass(frozen=True)
class DataConfig:
    paths: tuple[str, ...] = ()
    """Files or globs (** for subfolders). Empty: the built-in corpus, the Python source of the running interpreter's
    standard library."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out: those whose path ends as the glob says, as in "*.min.js" or "tests/**/*.py"."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """text: a file is a document. jsonl: a line is a document, also of *.jsonl.gz and *.jsonl.zst. parquet: a row is a
    document. auto: by a file's suffix, text where it is none of these."""
    text_field: str = "text"
    """Field of a jsonl record, or column of a parquet file, that holds the document's text."""
    max_epochs: int = 0
    """Epochs over the corpus after which the run ends; 0: no limit."""
    shuffle: bool = True
    """Read documents in a new pseudo-random order in every epoch, and deal the rows of every window in one, pure
    functions of training.seed. false: both in their natural order."""
    shuffle_block: int = 16384
    """Documents per shuffle block, in documents: blocks are permuted, then the documents in each block. A window's
    documents come from few blocks, so that larger ones mix better, and smaller ones read what lies together."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents fill rows. split: one after the other, cut where a row ends; no padding. best_fit: a document that
    fits in a row is not cut; what then stays free is padded and not trained."""
    window_tokens: int = 2**21
    """Tokens of a window, of all sources together: its rows are dealt in a pseudo-random order, so that a step's rows
    come from many documents. At least 64 rows, and at least a rank's rows of a step. A resume reads up to a window
    again."""
    held_out_fraction: float = 0.0
    """Share of the documents that is kept out of training, for validation: the same ones in every run."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What an unreadable record (bad JSON, missing field, invalid UTF-8) does. stop: the run ends and names it. skip:
    it is named, counted and left out."""
    max_bad_records: int = 1000
    """Number of records that on_bad_record = "skip" may leave out before the run stops; 0: no limit."""
    reader: Literal["auto", "streamed", "cached"] = "auto"
    """streamed: tokenise while training. cached: read a token cache, written first where there is none. auto: cached
    where a cache is there, the format needs one, or tokenising would take too many cores or decode the row groups of
    parquet over and over; else streamed. All of them give the same rows."""
    num_workers: int = 1
    """Threads per rank that read and tokenise; 0: in the thread that assembles batches."""
    prefetch: int = 2
    """Batches of this rank that are made ahead of the step; 0: none."""
    cache_dir: str = ""
    """Folder for indices and token caches. Empty: $XDG_CACHE_HOME/titanlite, else ~/.cache/titanlite."""
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    """A mixture: a table [data.sources.NAME] per source, NAME of A-Z, a-z, 0-9, _ and -. Then data.paths, exclude,
    format, text_field and max_epochs stay unset."""


def source_configs(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources by name, in the order of their names: where a table stands in a file must not change a run.

    A corpus that is no mixture is one source, "data".
    """
    if data.sources:
        return dict(sorted(data.sources.items()))
    return {"data": SourceConfig(data.paths, 1.0, data.exclude, data.format, data.text_field, data.max_epochs)}


@dataclass(frozen=True)
class ValidationConfig:
    enable: bool = False
    """Measure the loss on documents that are not trained on, every validation.freq steps and at the end."""
    freq: int = 500
    """Steps between validations."""
    only: bool = False
    """Validate the run's newest checkpoint (or checkpoint.load_step, or else checkpoint.init_from), print the result
    and end. Trains nothing, and writes nothing into the run's folder."""
    use_ema: bool = False
    """Validate, and sample from, the average of the weights (training.ema_decay) in place of the weights."""
    paths: tuple[str, ...] = ()
    """Files or globs (** for subfolders) of the documents to validate on. Empty: those that data.held_out_fraction
    keeps out of training."""
    exclude: tuple[str, ...] = ()
    """As data.exclude, for validation.paths."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """As data.format, for validation.paths."""
    text_field: str = "text"
    """As data.text_field, for validation.paths."""
    max_documents: int = 1000
    """Documents to validate on, of each source: the first ones in a pseudo-random order that never changes. 0: all. All
    data-parallel ranks together keep their tokens in memory."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model is to continue, greedily, for TensorBoard."""
    sample_freq: int = 500
    """Steps between samples."""
    sample_tokens: int = 64
    """Tokens to add to each of sample_prompts, at most."""
