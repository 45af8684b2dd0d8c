"""Other trainers of the same model, each in the way that its own documentation trains it. Imported only when run.

All start from titanlite's weights, so that their first losses must be equal. AdamW is fused everywhere, and clipping is
`clip_grad_norm_`; bfloat16 is autocast, with float32 weights, as titanlite's mixed precision keeps them too. Over
several ranks they use DistributedDataParallel.
"""

import sys
import threading
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.throughput.ours import Titanlite
from benchmarks.throughput.work import BETAS, EOS, LR, MAX_NORM, WEIGHT_DECAY, Case
from titanlite.convert.architecture import their_name, to_their_order
from titanlite.model.attention import build_documents


class Loop:
    """Forward, backward, clip, update: the loop that all peers but the Trainer leave to their user, or write so."""

    def __init__(self, case: Case, model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.case, self.loss = case, loss
        model.to(case.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        if case.compiled:
            model.compile()
        self.model = DistributedDataParallel(model) if case.processes > 1 else model

    def step(self, rows: Tensor) -> Tensor:
        with self.case.autocast:
            loss = self.loss(self.model, rows.to(self.case.device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _hugging_face_model(case: Case) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = case.model
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        max_position_embeddings=case.seq_len,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
    )
    result: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    weights = {their_name(k): to_their_order(k, w, model) for k, w in Titanlite(case).weights().items()}
    result.load_state_dict(weights)
    return result


def transformers_loop(case: Case) -> Loop:
    """Attends over whole rows, as packed training with its sdpa attention does unless told where documents are."""

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        targets = rows[:, 1:].contiguous()
        return model(input_ids=rows[:, :-1], labels=targets, shift_labels=targets).loss

    return Loop(case, _hugging_face_model(case), loss)


def transformers_documents(case: Case) -> Loop:
    """Given positions that begin anew with each document, transformers makes a dense mask of them."""

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        positions = build_documents(rows[:, :-1], EOS, "sdpa").positions
        targets = rows[:, 1:].contiguous()
        return model(input_ids=rows[:, :-1], position_ids=positions, labels=targets, shift_labels=targets).loss

    return Loop(case, _hugging_face_model(case), loss)


class HuggingFaceTrainer:
    """transformers.Trainer in a thread of its own, which is let go for a step at a time."""

    def __init__(self, case: Case, all_rows: Tensor) -> None:
        from torch.utils.data import IterableDataset
        from transformers import Trainer, TrainerCallback, TrainingArguments

        may_step, stepped = threading.Semaphore(0), threading.Semaphore(0)
        self._may_step, self._stepped, self._error = may_step, stepped, ""

        class Rows(IterableDataset):
            def __iter__(self) -> Iterator[dict[str, Tensor]]:
                for row in all_rows.flatten(0, 1):
                    yield {"input_ids": row[:-1], "labels": row[:-1]}  # it shifts them itself: one target less a row

        class Turns(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                may_step.acquire()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                stepped.release()

        arguments = TrainingArguments(
            output_dir="trainer",  # in the folder of this process
            max_steps=len(all_rows),
            per_device_train_batch_size=case.rows,
            learning_rate=LR,
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_NORM,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=case.dtype == "bfloat16",
            use_cpu=True,
            torch_compile=case.compiled,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(_hugging_face_model(case), arguments, train_dataset=Rows(), callbacks=[Turns()])

        def train() -> None:
            torch.set_num_threads(case.threads // case.processes)
            try:
                trainer.train()
            except BaseException as error:
                self._error = f"{type(error).__name__}: {error}"
                stepped.release()

        threading.Thread(target=train, daemon=True).start()

    def step(self, rows: Tensor) -> None:
        del rows  # it has its own iterator over the same ones
        self._may_step.release()
        self._stepped.acquire()
        if self._error:
            raise RuntimeError(self._error)


def litgpt(case: Case) -> Loop:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    ours = case.model
    model = GPT(
        Config(
            block_size=case.seq_len,
            n_layer=ours.n_layers,
            n_embd=ours.dim,
            n_head=ours.n_heads,
            n_query_groups=ours.n_kv_heads,
            vocab_size=ours.vocab_size,
            padded_vocab_size=ours.vocab_size,
            norm_class_name="RMSNorm",
            norm_eps=ours.norm_eps,
            parallel_residual=False,
            rope_base=int(ours.rope_theta),
            rotary_percentage=1.0,
            intermediate_size=ours.ffn_dim,
            bias=False,
            mlp_class_name="LLaMAMLP",
        )
    )
    weights = {name: to_their_order(name, w, ours) for name, w in Titanlite(case).weights().items()}
    theirs = {
        "transformer.wte.weight": weights["tok_embeddings.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for n in range(ours.n_layers):
        layer, block = f"layers.{n}", f"transformer.h.{n}"
        theirs[f"{block}.attn.qkv.weight"] = torch.cat([weights[f"{layer}.attention.w{x}.weight"] for x in "qkv"])
        names = {"attn.proj": "attention.wo", "norm_1": "attention_norm", "norm_2": "ffn_norm"}
        names |= {"mlp.fc_1": "feed_forward.w1", "mlp.fc_2": "feed_forward.w3", "mlp.proj": "feed_forward.w2"}
        theirs |= {f"{block}.{their}.weight": weights[f"{layer}.{our}.weight"] for their, our in names.items()}
    model.load_state_dict(theirs)
    return Loop(case, model, lambda m, rows: chunked_cross_entropy(m(rows[:, :-1]), rows[:, 1:]))


def torchtitan(case: Case) -> Loop:
    """torchtitan's model in a plain loop. On a CPU it runs only after two changes from outside: a package of GPU
    kernels for experts that its import asks for (and with it triton) is left empty, and the layers' attention is its
    own ScaledDotProductAttention, which attends over whole rows (its flex and varlen attention need CUDA)."""
    absent = "torchtitan.distributed.minimal_async_ep"
    sys.modules[absent] = _Empty(absent)
    from torchtitan.models import llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    ours = case.model
    layers = llama3._build_llama3_layers(
        n_layers=ours.n_layers,
        dim=ours.dim,
        n_heads=ours.n_heads,
        n_kv_heads=ours.n_kv_heads,
        hidden_dim=ours.ffn_dim,
        fuse_qkv=True,
        attn_backend="flex",
        rope=llama3.ComplexRoPE.Config(
            dim=ours.dim // ours.n_heads, max_seq_len=case.seq_len, theta=ours.rope_theta, scaling="none"
        ),
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = llama3.Llama3Model.Config(
        dim=ours.dim,
        vocab_size=ours.vocab_size,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=ours.vocab_size, embedding_dim=ours.dim, param_init=llama3._EMBEDDING_INIT
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=ours.dim, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=ours.dim, out_features=ours.vocab_size, param_init=llama3._output_linear_init(ours.dim)
        ),
        layers=layers,
        enable_weight_tying=ours.tie_embeddings,
    ).build()
    model.init_states(buffer_device=torch.device("cpu"))
    weights, theirs = Titanlite(case).weights(), {}
    for name, parameter in model.named_parameters():
        our = name.replace("lm_head", "output")
        if "wqkv" in name:  # for each group of heads: its queries, its key, its value
            prefix = name.split("attention.")[0] + "attention."
            groups = [weights[f"{prefix}w{x}.weight"].unflatten(0, (ours.n_kv_heads, -1)) for x in "qkv"]
            theirs[name] = torch.cat(groups, 1).reshape(parameter.shape)
        else:
            theirs[name] = weights[our]
    model.load_state_dict(theirs, strict=False)

    def loss(m: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(m(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())

    return Loop(case, model, loss)


class _Empty(types.ModuleType):
    """A module whose every name is None."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
