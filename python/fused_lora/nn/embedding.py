"""Embeddings with an adapter: by position, behind a soft prompt (DePT), or by token (LoRA).

Symbols: ids [..., L], weight E [V, D] frozen; DePT: prompt P [m, D], lora_a A [S, R], lora_b B [R,
D]; LoRA: lora_a A [R, V], lora_b B [D, R].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_lora.nn.checks import check_choice, check_embedding, check_number, check_rank
from fused_lora.nn.linear import lora_scale
from fused_lora.ops import validation as check
from fused_lora.ops.dept_embedding import dept_embedding
from fused_lora.ops.lora_embedding import lora_embedding

DEPT_INITS = ("kaiming", "gaussian", False)
PROMPT_INITS = ("random", "vocab")


def dept_rank(length: int, max_length: int, dim: int, prompt_length: int) -> int:
    """The rank r, rounded down, at which DePT trains what a prompt of `length` rows trains:

        length * dim = prompt_length * dim + (max_length + dim) * r       (arXiv 2309.05173)

    So a prompt of 100 rows of T5-base (dim 768) and inputs of 256 tokens give 45, 30 and 15 for
    prompt_length 40, 60 and 80. Raises TypeError for what is not an int, ValueError where what is
    left over does not make a rank of 1.
    """
    named = {"length": length, "max_length": max_length, "dim": dim}
    for name, value in named.items():
        check_rank(name, value)
    if prompt_length != 0:
        check_rank("prompt_length", prompt_length)
    r = (length - prompt_length) * dim // (max_length + dim)
    if r < 1:
        raise ValueError(
            f"prompt_length {prompt_length} of {length} leaves {(length - prompt_length) * dim} "
            f"parameters, and a rank of 1 takes {max_length + dim}"
        )
    return r


def _check_adapter_dtype(adapter_dtype, weight_dtype) -> None:
    if adapter_dtype not in (None, weight_dtype, torch.float32):
        raise TypeError(
            f"adapter_dtype must be None, the weight's {weight_dtype} or torch.float32, got "
            f"{adapter_dtype}"
        )


def _adopt(layer: torch.nn.Embedding, embedding: torch.nn.Embedding) -> None:
    """`layer`, of which nothing is made yet, shares the weight of `embedding`."""
    torch.nn.Module.__init__(layer)
    for name in torch.nn.Embedding.__constants__:
        setattr(layer, name, getattr(embedding, name))
    layer.weight = embedding.weight


class DePTEmbedding(torch.nn.Embedding):
    """y = [P ; E[ids] + scale * (A B)[positions]]: word embeddings with a decomposed soft prompt.

    DePT, arXiv 2309.05173. weight E [V, D] keeps its name and is frozen; prompt P [m, D], lora_a A
    [S, R] and lora_b B [R, D] are trained. ids [..., L] -> y [..., m + L, D].

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in nn.Embedding.
        prompt_length: m; 0 for none.
        max_length: S; a token at position S or later gets nothing added.
        r: rank; dept_rank finds the one that trains as much as a longer prompt.
        lora_alpha: scale = lora_alpha / sqrt(r), as the paper's authors have it, or lora_alpha / r
            without use_rslora.
        init: A is drawn from Kaiming-uniform with a = sqrt(5) ("kaiming", the authors') or from
            N(0, 1/r^2) ("gaussian"); B is zero, so that nothing is added at the start. False draws
            B too, which is for tests.
        prompt_init: "vocab" takes the embeddings of words drawn at random, "random" N(0, 1); a
            tensor or a list of ids takes those words, over and over until there are m.
        adapter_dtype: dtype of prompt, A and B: None is the weight's; torch.float32 keeps masters.

    Built on the meta device, prompt and pair are drawn by to_empty(), but that a prompt of words is
    NaN until a state_dict brings the words, or reset_parameters() is called where they are.

    Raises TypeError and ValueError that name the argument, before anything is allocated.
    """

    prompt: Parameter | None
    lora_a: Parameter
    lora_b: Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        prompt_length: int,
        max_length: int,
        r: int,
        lora_alpha: float = 8,
        use_rslora: bool = True,
        init: bool | str = "kaiming",
        prompt_init: str | Tensor | Sequence[int] = "vocab",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        weight_dtype = dtype or torch.get_default_dtype()
        options = (prompt_length, max_length, r, lora_alpha, use_rslora, init, adapter_dtype)
        self._check(num_embeddings, weight_dtype, prompt_init, *options)
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._add_adapter(prompt_init, *options)

    @classmethod
    def from_embedding(
        cls,
        embedding: torch.nn.Embedding,
        prompt_length: int,
        max_length: int,
        r: int,
        lora_alpha: float = 8,
        use_rslora: bool = True,
        init: bool | str = "kaiming",
        prompt_init: str | Tensor | Sequence[int] = "vocab",
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> "DePTEmbedding":
        """The adapted form of `embedding`, whose weight it shares and freezes.

        Raises TypeError for anything but a plain nn.Embedding of a dense floating weight:
        subclasses are refused by name, and so are hooks and options that change the weight.
        """
        check_embedding("embedding", embedding)
        options = (prompt_length, max_length, r, lora_alpha, use_rslora, init, adapter_dtype)
        cls._check(embedding.num_embeddings, embedding.weight.dtype, prompt_init, *options)
        layer = cls.__new__(cls)
        _adopt(layer, embedding)
        layer._add_adapter(prompt_init, *options)
        return layer.train(embedding.training)

    @staticmethod
    def _check(
        V, dtype, prompt_init, prompt_length, max_length, r, lora_alpha, rslora, init, adapter_dtype
    ) -> None:
        if prompt_length != 0:
            check_rank("prompt_length", prompt_length)
        check_rank("max_length", max_length)
        check_rank("r", r)
        check_number("lora_alpha", lora_alpha)
        check_choice("use_rslora", rslora, (True, False))
        check_choice("init", init, DEPT_INITS)
        _check_adapter_dtype(adapter_dtype, dtype)
        if isinstance(prompt_init, str):
            check_choice("prompt_init", prompt_init, PROMPT_INITS)
            return
        ids = prompt_init
        if not isinstance(ids, Tensor):
            ids = torch.tensor(ids, device="cpu")
        if ids.dtype not in check.INTEGERS or ids.ndim != 1 or not len(ids):
            raise ValueError(
                f"prompt_init must be one of {', '.join(map(repr, PROMPT_INITS))} or the ids of "
                f"words, got a {check.names([ids.dtype])} tensor of shape {list(ids.shape)}"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise ValueError(f"prompt_init must have ids in [0, {V}), got {ids.tolist()}")

    def _add_adapter(
        self, prompt_init, prompt_length, max_length, r, lora_alpha, use_rslora, init, adapter_dtype
    ) -> None:
        self.prompt_length, self.max_length = prompt_length, max_length
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.init, self.prompt_init = init, prompt_init
        self._wordless = False  # weight has no words yet that a prompt could be made of
        self.scale = lora_scale(lora_alpha, r, use_rslora)
        self.weight.requires_grad_(False)
        dtype, D = adapter_dtype or self.weight.dtype, self.embedding_dim
        self.lora_a = Parameter(self.weight.new_empty(max_length, r, dtype=dtype))
        self.lora_b = Parameter(self.weight.new_empty(r, D, dtype=dtype))
        self.register_parameter("prompt", None)
        if prompt_length:
            self.prompt = Parameter(self.weight.new_empty(prompt_length, D, dtype=dtype))
        self.reset_dept_parameters()

    def reset_parameters(self) -> None:
        """Draw prompt and pair anew: what is trained. weight is left as it is."""
        if "lora_a" in self._parameters:
            self.reset_dept_parameters()
        else:  # nn.Embedding's own construction
            super().reset_parameters()

    @torch.no_grad()
    def reset_dept_parameters(self) -> None:
        """Draw prompt and pair anew, as prompt_init and init say."""
        if self.init == "gaussian":
            torch.nn.init.normal_(self.lora_a, std=1 / self.r)
        else:
            torch.nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        if self.init is False:
            torch.nn.init.kaiming_uniform_(self.lora_b, a=math.sqrt(5))
        else:
            torch.nn.init.zeros_(self.lora_b)
        self._draw_prompt()

    @torch.no_grad()
    def _draw_prompt(self) -> None:
        if self.prompt is None:
            return
        if isinstance(self.prompt_init, str) and self.prompt_init == "random":
            torch.nn.init.normal_(self.prompt)
            return
        device = self.weight.device
        if isinstance(self.prompt_init, str):
            ids = torch.randint(self.num_embeddings, (self.prompt_length,), device=device)
        else:
            given = torch.as_tensor(self.prompt_init, device=device).long()
            ids = given[torch.arange(self.prompt_length, device=device) % len(given)]
        self.prompt.copy_(self.weight[ids])

    def _apply(self, fn, recurse=True):
        from_meta = self.lora_a.is_meta
        super()._apply(fn, recurse)
        if from_meta and not self.lora_a.is_meta:  # to_empty: memory without values
            self.reset_dept_parameters()
            if self.prompt is not None and self.prompt_init != "random":
                torch.nn.init.constant_(self.prompt, math.nan)
                self._wordless = True
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._wordless and f"{prefix}weight" in state_dict:
            self._wordless = False
            if f"{prefix}prompt" not in state_dict:
                self._draw_prompt()

    def forward(
        self, input: Tensor, positions: Tensor | None = None, with_prompt: bool = True
    ) -> Tensor:
        """[..., m + L, D], or [..., L, D] without the prompt; positions as in dept_embedding."""
        return dept_embedding(
            input,
            self.weight,
            self.prompt if with_prompt else None,
            self.lora_a,
            self.lora_b,
            scale=self.scale,
            positions=positions,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, prompt_length={self.prompt_length}, "
            f"max_length={self.max_length}, r={self.r}, lora_alpha={self.lora_alpha:g}, "
            f"scale={self.scale:g}"
        )


class LoRAEmbedding(torch.nn.Embedding):
    """y = E[ids] + scale * A^T[ids] B^T: an embedding with a low-rank adapter by token (LoRA).

    arXiv 2106.09685, in PEFT's layout. weight E [V, D] keeps its name and is frozen; lora_a A [R,
    V] and lora_b B [D, R] are trained.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in nn.Embedding.
        r: rank. lora_alpha: scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        init: True makes A zero and draws B from N(0, 1), as PEFT does, so that nothing is added at
            the start; False draws A too, which is for tests.
        adapter_dtype: dtype of A and B: None is the weight's; torch.float32 keeps masters.

    Raises TypeError and ValueError that name the argument, before anything is allocated.
    """

    lora_a: Parameter
    lora_b: Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        init: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        options = (r, lora_alpha, use_rslora, init, adapter_dtype)
        self._check(dtype or torch.get_default_dtype(), *options)
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._add_adapter(*options)

    @classmethod
    def from_embedding(
        cls,
        embedding: torch.nn.Embedding,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        init: bool = True,
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> "LoRAEmbedding":
        """The adapted form of `embedding`, whose weight it shares and freezes.

        Raises TypeError for anything but a plain nn.Embedding, as DePTEmbedding.from_embedding.
        """
        check_embedding("embedding", embedding)
        options = (r, lora_alpha, use_rslora, init, adapter_dtype)
        cls._check(embedding.weight.dtype, *options)
        layer = cls.__new__(cls)
        _adopt(layer, embedding)
        layer._add_adapter(*options)
        return layer.train(embedding.training)

    @staticmethod
    def _check(weight_dtype, r, lora_alpha, use_rslora, init, adapter_dtype) -> None:
        check_rank("r", r)
        check_number("lora_alpha", lora_alpha)
        check_choice("use_rslora", use_rslora, (True, False))
        check_choice("init", init, (True, False))
        _check_adapter_dtype(adapter_dtype, weight_dtype)

    def _add_adapter(self, r, lora_alpha, use_rslora, init, adapter_dtype) -> None:
        self.r, self.lora_alpha, self.use_rslora, self.init = r, lora_alpha, use_rslora, init
        self.scale = lora_scale(lora_alpha, r, use_rslora)
        self.weight.requires_grad_(False)
        dtype = adapter_dtype or self.weight.dtype
        self.lora_a = Parameter(self.weight.new_empty(r, self.num_embeddings, dtype=dtype))
        self.lora_b = Parameter(self.weight.new_empty(self.embedding_dim, r, dtype=dtype))
        self.reset_lora_parameters()

    def reset_parameters(self) -> None:
        """Draw the adapter anew: what is trained. weight is left as it is."""
        if "lora_a" in self._parameters:
            self.reset_lora_parameters()
        else:  # nn.Embedding's own construction
            super().reset_parameters()

    def _apply(self, fn, recurse=True):
        from_meta = self.lora_a.is_meta
        super()._apply(fn, recurse)
        if from_meta and not self.lora_a.is_meta:  # to_empty: memory without values
            self.reset_lora_parameters()
        return self

    def reset_lora_parameters(self) -> None:
        """Draw the adapter anew, as `init` says."""
        torch.nn.init.normal_(self.lora_b)
        if self.init:
            torch.nn.init.zeros_(self.lora_a)
        else:
            torch.nn.init.normal_(self.lora_a)

    def forward(self, input: Tensor) -> Tensor:
        return lora_embedding(
            input,
            self.weight,
            self.lora_a,
            self.lora_b,
            scale=self.scale,
            padding_idx=self.padding_idx,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha:g}, "
            f"scale={self.scale:g}"
        )
