"""The sections of a titanlite config: every key, its type and range, its default, its meaning and its unit.

The text below a field is what `--help` prints. Names follow torchtitan's TOML configs where the meaning is the same.
This module imports nothing slow, so that a config check takes milliseconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple


class Range(NamedTuple):
    """The values that a key may have, besides being of its type."""

    words: str
    """After "must be"."""
    holds: Callable[[Any], bool]


_LIMIT = 2**31  # of counts: every one of them ends up as a 32-bit size or index somewhere
Count = Annotated[int, Range("from 1 to 2147483647", lambda v: 1 <= v < _LIMIT)]
CountOrNone = Annotated[int, Range("from 0 to 2147483647", lambda v: 0 <= v < _LIMIT)]
CountOrAll = Annotated[int, Range("-1, or from 1 to 2147483647", lambda v: v == -1 or 1 <= v < _LIMIT)]
Iterations = Annotated[int, Range("from 1 to 99", lambda v: 1 <= v <= 99)]
Seed = Annotated[int, Range("from 0 to 9223372036854775807", lambda v: 0 <= v < 2**63)]
Positive = Annotated[float, Range("above 0", lambda v: v > 0)]
NotNegative = Annotated[float, Range("at least 0", lambda v: v >= 0)]
Factor = Annotated[float, Range("at least 1", lambda v: v >= 1)]
Weight = Annotated[float, Range("from 0 to 1e18", lambda v: 0 <= v <= 1e18)]
Share = Annotated[float, Range("from 0 to 1", lambda v: 0 <= v <= 1)]
Fraction = Annotated[float, Range("at least 0 and below 1", lambda v: 0 <= v < 1)]
Text = Annotated[str, Range("not empty", bool)]
Texts = Annotated[tuple[str, ...], Range("without empty strings", all)]


@dataclass(frozen=True)
class SourceConfig:
    """A table `[data.sources.NAME]`: one source of a mixture."""

    paths: Texts = ()
    """Files or globs (** for subfolders) of this source."""
    weight: Weight = 1.0
    """Share of this source in the rows that are trained, relative to the other weights; 0: none of them."""
    exclude: Texts = ()
    """As data.exclude, for the files of this source."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """As data.format, for the files of this source."""
    text_field: Text = "text"
    """As data.text_field, for the files of this source."""
    max_epochs: CountOrNone = 0
    """Epochs over this source after which the run ends; 0: no limit."""


@dataclass(frozen=True)
class DataConfig:
    paths: Texts = ()
    """Files or globs (** for subfolders). Empty: the built-in corpus, the Python source of the running interpreter's
    standard library."""
    exclude: Texts = ()
    """Globs of files to leave out: those whose path ends as the glob says, as in "*.min.js" or "tests/**/*.py"."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """text: a file is a document. jsonl: a line is a document, also of *.jsonl.gz and *.jsonl.zst. parquet: a row is a
    document. auto: by a file's suffix, text where it is none of these."""
    text_field: Text = "text"
    """Field of a jsonl record, or column of a parquet file, that holds the document's text."""
    max_epochs: CountOrNone = 0
    """Epochs over the corpus after which the run ends; 0: no limit."""
    shuffle: bool = True
    """Read documents in a new pseudo-random order in every epoch, and deal the rows of every window in one, pure
    functions of training.seed. false: both in their natural order."""
    shuffle_block: Count = 16384
    """Documents per shuffle block, in documents: blocks are permuted, then the documents in each block. A window's
    documents come from few blocks, so that larger ones mix better, and smaller ones read what lies together."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents fill rows. split: one after the other, cut where a row ends; no padding. best_fit: a document that
    fits in a row is not cut; what then stays free is padded and not trained."""
    window_tokens: Count = 2**21
    """Tokens of a window, of all sources together: its rows are dealt in a pseudo-random order, so that a step's rows
    come from many documents. At least 64 rows, and at least a rank's rows of a step. A resume reads up to a window
    again."""
    held_out_fraction: Fraction = 0.0
    """Share of the documents that is kept out of training, for validation: the same ones in every run."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What an unreadable record (bad JSON, missing field, invalid UTF-8) does. stop: the run ends and names it. skip:
    it is named, counted and left out."""
    max_bad_records: CountOrNone = 1000
    """Number of records that on_bad_record = "skip" may leave out before the run stops; 0: no limit."""
    reader: Literal["auto", "streamed", "cached"] = "auto"
    """streamed: tokenise while training. cached: read a token cache, written first where there is none. auto: cached
    where a cache is there, the format needs one, or tokenising would take too many cores or decode the row groups of
    parquet over and over; else streamed. All of them give the same rows."""
    num_workers: CountOrNone = 1
    """Threads per rank that read and tokenise; 0: in the thread that assembles batches."""
    prefetch: CountOrNone = 2
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
    freq: Count = 500
    """Steps between validations."""
    only: bool = False
    """Validate the run's newest checkpoint (or checkpoint.load_step, or else checkpoint.init_from), print the result
    and end. Trains nothing, and writes nothing into the run's folder."""
    use_ema: bool = False
    """Validate, and sample from, the average of the weights (training.ema_decay) in place of the weights."""
    paths: Texts = ()
    """Files or globs (** for subfolders) of the documents to validate on. Empty: those that data.held_out_fraction
    keeps out of training."""
    exclude: Texts = ()
    """As data.exclude, for validation.paths."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """As data.format, for validation.paths."""
    text_field: Text = "text"
    """As data.text_field, for validation.paths."""
    max_documents: CountOrNone = 1000
    """Documents to validate on, of each source: the first ones in a pseudo-random order that never changes. 0: all. All
    data-parallel ranks together keep their tokens in memory."""
    sample_prompts: Texts = ()
    """Texts that the model is to continue, greedily, for TensorBoard."""
    sample_freq: Count = 500
    """Steps between samples."""
    sample_tokens: Count = 64
    """Tokens to add to each of sample_prompts, at most."""


@dataclass(frozen=True)
class JobConfig:
    config_file: str = ""
    """TOML file to read; empty: defaults and command line only."""
    dump_folder: Text = "outputs"
    """Run folder: resolved config, metrics, TensorBoard events and checkpoints. Several nodes need a shared one."""
    description: str = ""
    """Free text, logged at start and kept with the run."""


@dataclass(frozen=True)
class ModelConfig:
    dim: Count = 256
    """Width of the residual stream."""
    n_layers: Count = 4
    """Number of transformer blocks."""
    n_heads: Count = 8
    """Number of query heads."""
    n_kv_heads: Count = 4
    """Number of key and value heads (grouped-query attention); divides n_heads."""
    head_dim: CountOrNone = 0
    """Width of a head; 0: dim / n_heads."""
    ffn_dim: Count = 768
    """Inner width of the SwiGLU feed-forward layer."""
    vocab_size: Count = 8192
    """Rows of the embedding and of the output head; at least the tokenizer's vocabulary."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head too."""
    attention_bias: bool = False
    """Add biases to wq, wk, wv and wo."""
    mlp_bias: bool = False
    """Add biases to the feed-forward layers."""
    norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights; projections into the residual stream use init_std / sqrt(2 n_layers)."""
    rope_theta: Positive = 500000.0
    """Base of the rotary frequencies."""
    rope_scaling_factor: Factor = 1.0
    """Llama 3.1 frequency scaling: how far low frequencies are stretched; 1 turns scaling off."""
    rope_low_freq_factor: Positive = 1.0
    """Llama 3.1 frequency scaling: wavelengths above original_max_seq_len / this are stretched fully."""
    rope_high_freq_factor: Positive = 4.0
    """Llama 3.1 frequency scaling: wavelengths below original_max_seq_len / this are left alone."""
    rope_original_max_seq_len: Count = 8192
    """Llama 3.1 frequency scaling: context length, in tokens, that the unscaled frequencies were trained for."""
    attention: Literal["auto", "flex", "sdpa", "dense"] = "auto"
    """Realisation of the document rule. auto: flex on CUDA, sdpa (a loop over documents) on CPU; an explicit value
    never changes. dense: SDPA with a boolean S x S mask, slow, runs everywhere."""

    @property
    def head_size(self) -> int:
        """head_dim, where it is not left to the other sizes."""
        return self.head_dim or self.dim // self.n_heads


@dataclass(frozen=True)
class TokenizerConfig:
    path: Text = "assets/tokenizer"
    """Folder with tokenizer.model (tiktoken BPE ranks) and tokenizer_config.json (special tokens, split pattern)."""


@dataclass(frozen=True)
class TrainingConfig:
    steps: Count = 100
    """Optimiser steps to train."""
    seq_len: Count = 2048
    """Length of a row, in tokens."""
    local_batch_size: Count = 1
    """Rows of one forward and backward pass of a data-parallel rank, at most: its share of the step may be less."""
    global_batch_size: Count = 8
    """Rows of one optimiser step over all ranks; gradient accumulation follows from it."""
    seed: Seed = 0
    """Seed of the initial weights and of the document order."""
    max_norm: NotNegative = 1.0
    """Gradients are scaled down to this global 2-norm when they exceed it; 0 turns clipping off."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters and of the optimiser state."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """Type of the parameters in forward and backward. auto: bfloat16 on CUDA, training.dtype on CPU."""
    mixed_precision_reduce: Literal["auto", "float32", "float64"] = "auto"
    """Type in which gradients are reduced over ranks. auto: training.dtype."""
    deterministic: bool = False
    """Use deterministic algorithms only (CUDA: slower; same layout then gives the same bits)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does. stop: no update from that step on, all ranks end at the next logged
    step. skip: that update is left out and counted."""
    max_skipped_steps: Count = 10
    """Number of updates that on_nonfinite = "skip" may leave out before the run stops."""
    ema_decay: Fraction = 0.0
    """Keep an exponential moving average of the weights, too, which keeps this share of itself at each update (0.999);
    0: none."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """adamw: for all parameters. muon: for the matrices of the transformer blocks, whose updates are orthogonalised;
    AdamW for the embedding, the output head, norms and biases."""
    lr: Positive = 3e-4
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's, whose rate is where to begin."""
    beta1: Fraction = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices; norms and biases are not decayed."""
    muon_momentum: Fraction = 0.95
    """Decay rate of Muon's momentum, which is Nesterov's."""
    muon_ns_steps: Iterations = 5
    """Newton-Schulz iterations that orthogonalise an update of Muon."""


@dataclass(frozen=True)
class LrSchedulerConfig:
    total_steps: CountOrNone = 0
    """Length of the schedule, where the run is to end before it or is to go on later; 0: training.steps."""
    warmup_steps: CountOrNone = 0
    """Steps of linear warm-up from 0 to optimizer.lr."""
    decay_type: Literal["cosine", "linear", "sqrt"] = "cosine"
    """Shape of the decay."""
    decay_ratio: Share = 1.0
    """Share of the schedule spent decaying, at the end. 1: decay starts after the warm-up (cosine, linear); less: the
    rate stays at its peak in between (warmup-stable-decay); 0: constant after the warm-up."""
    lr_min: Share = 0.0
    """Rate that the decay comes to after its last step, as a fraction of optimizer.lr."""


@dataclass(frozen=True)
class ParallelismConfig:
    data_parallel_replicate_degree: Count = 1
    """Replicas of the sharded model (HSDP when above 1)."""
    data_parallel_shard_degree: CountOrAll = -1
    """Ranks that share one sharded copy of the model (FSDP2). -1: all ranks that the other degrees leave."""
    tensor_parallel_degree: Count = 1
    """Ranks that split each layer (tensor, sequence and loss parallelism)."""
    fsdp_reshard_after_forward: Literal["always", "never"] = "always"
    """Free gathered parameters after the forward pass of a block (always) or keep them for its backward (never)."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimiser state in CPU memory between uses (CUDA only)."""


@dataclass(frozen=True)
class ActivationCheckpointConfig:
    mode: Literal["none", "selective", "full"] = "selective"
    """none: keep all activations. selective: keep the results of attention and of every second matrix product and
    recompute the rest. full: keep only the input of each block."""


@dataclass(frozen=True)
class CompileConfig:
    enable: bool = False
    """Compile each transformer block with torch.compile."""
    backend: Text = "inductor"
    """Backend of torch.compile."""


@dataclass(frozen=True)
class CheckpointConfig:
    enable: bool = True
    """Save distributed checkpoints into <dump_folder>/checkpoint."""
    interval: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_latest_k: CountOrNone = 3
    """Number of newest checkpoints to keep; 0 keeps all."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: copy the state to CPU memory, then write in the background while training goes on."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written does. stop: the run ends. continue: it is told, counted and tried again
    at the next interval; the last save of a run must succeed."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue from the newest valid checkpoint, else start anew. must: as auto, but having none is an error.
    never: start anew; refuses a run folder that holds checkpoints."""
    load_step: CountOrAll = -1
    """Step to resume from; -1: the newest. For the command line: in a file it would turn every later start back."""
    init_from: str = ""
    """Checkpoint folder (.../step-N) whose weights start a new run; a run that can resume does not read it."""


@dataclass(frozen=True)
class MetricsConfig:
    log_freq: Count = 10
    """Steps between logged steps (console, TensorBoard, metrics.jsonl)."""
    enable_tensorboard: bool = True
    """Write TensorBoard events into <dump_folder>/tb."""


@dataclass(frozen=True)
class ProfilingConfig:
    enable_profiling: bool = False
    """Write torch.profiler traces into <dump_folder>/profile."""
    profile_freq: Count = 100
    """Steps between traces; each trace covers the last 3 of them."""
    enable_memory_snapshot: bool = False
    """Write CUDA memory snapshots into <dump_folder>/memory at profile_freq and when memory runs out."""


@dataclass(frozen=True)
class CommConfig:
    init_timeout_seconds: Count = 600
    """Seconds that a rank may stand still until the first step is done (waiting for other ranks, compilation) before
    the job ends and names it. Preparing data (index, token cache) has no limit, a save or a load half an hour."""
    train_timeout_seconds: Count = 300
    """The same after the first step: the limit of a micro-batch, or of a wait for data or for other ranks."""
    grace_seconds: CountOrNone = 0
    """Seconds from SIGTERM or SIGUSR1 until all ranks leave, with the step and the save done or not. 0: when they are
    done. Set it below what the scheduler gives."""


@dataclass(frozen=True)
class Config:
    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    comm: CommConfig = field(default_factory=CommConfig)
