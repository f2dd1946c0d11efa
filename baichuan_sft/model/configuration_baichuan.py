"""One configuration for the four Baichuan architectures.

    model           position_embedding   lm_head   facts in the vendor's config.json
    Baichuan-7B     rope                 plain     max_position_embeddings, vocab_size 64000
    Baichuan-13B    alibi                plain     model_max_length,        vocab_size 64000
    Baichuan2-7B    rope                 norm      max_position_embeddings, vocab_size 125696
    Baichuan2-13B   alibi                norm      model_max_length,        vocab_size 125696

The vendor's files carry neither of the two middle columns, so they are inferred from the last one;
files written by this code carry them, and then nothing is inferred.
"""

from transformers import PreTrainedConfig

POSITION_EMBEDDINGS = ("rope", "alibi")
LM_HEADS = ("plain", "norm")
VOCAB_SIZE_V1 = 64000
VOCAB_SIZE_V2 = 125696
# A fine-tuned model may have grown its vocabulary by added tokens; far less than this.
MAX_ADDED_TOKENS = 8192


def infer_position_embedding(max_position_embeddings, model_max_length):
    """``rope`` where the config has RoPE's table length (7B), ``alibi`` where it has only ALiBi's (13B).

    Raises:
        ValueError: neither fact is there.
    """
    if max_position_embeddings is not None:
        return "rope"
    if model_max_length is not None:
        return "alibi"
    raise ValueError(
        "this config fits no Baichuan model: it has neither max_position_embeddings (7B, RoPE) nor "
        "model_max_length (13B, ALiBi); add the one it was trained with"
    )


def infer_lm_head(vocab_size, z_loss_weight):
    """``norm`` (Baichuan2's NormHead) or ``plain``, by the vocabulary or the z-loss that only Baichuan2 has.

    Raises:
        ValueError: the vocabulary lies between the two families' sizes.
    """
    if z_loss_weight is not None or VOCAB_SIZE_V2 <= vocab_size <= VOCAB_SIZE_V2 + MAX_ADDED_TOKENS:
        return "norm"
    if vocab_size <= VOCAB_SIZE_V1 + MAX_ADDED_TOKENS:
        return "plain"
    raise ValueError(
        f"this config fits no Baichuan model: vocab_size is {vocab_size}, Baichuan has {VOCAB_SIZE_V1} and "
        f"Baichuan2 {VOCAB_SIZE_V2}; if it is right, add lm_head: plain | norm (NormHead)"
    )


def check_foreign_settings(settings, num_attention_heads):
    """Refuse what other families' configs can say and this code would not do, such as scaled RoPE.

    Raises:
        ValueError: a setting that is not the Baichuan family's.
    """
    for name, ours in (
        ("rope_theta", 10000.0),
        ("rope_scaling", None),
        ("rope_parameters", None),
        ("num_key_value_heads", num_attention_heads),
        ("attention_bias", False),
        ("attention_dropout", 0.0),
        ("sliding_window", None),
    ):
        value = settings.get(name)
        if value is not None and value != ours:
            raise ValueError(
                f"config {name} is {value!r}; a Baichuan model has {ours!r} and no other is supported"
            )


class BaichuanConfig(PreTrainedConfig):
    """Shape and kind of a Baichuan model; the vendor's ``config.json`` of all four loads unchanged.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the shape.
        max_position_embeddings: RoPE models: trained context, tokens. Longer input works, untrained.
        model_max_length: ALiBi models (and Baichuan2-7B): trained context, tokens.
        position_embedding: ``rope`` or ``alibi``; None infers it.
        lm_head: ``plain`` or ``norm``; None infers it.
        z_loss_weight: weight of the mean squared maximal logit in the loss (Baichuan2); None is 0.
        z_loss_kind: ``max``, the vendor's, or ``logsumexp``, which the largest logit is close to.

    Raises:
        ValueError: the facts fit none of the four architectures.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference = ["past_key_values"]
    # There is no model without a shape; transformers would otherwise build one to diff against on save.
    has_no_defaults_at_init = True
    z_loss_weight = 0.0
    z_loss_kind = "max"

    def __init__(
        self,
        vocab_size=None,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        hidden_act="silu",
        max_position_embeddings=None,
        model_max_length=None,
        position_embedding=None,
        lm_head=None,
        z_loss_weight=None,
        z_loss_kind=None,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if vocab_size is None:
            raise ValueError("this config fits no Baichuan model: it has no vocab_size")
        for name, value in dict(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
        ).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"config {name} is {value!r}; it must be a positive integer")
        check_foreign_settings(kwargs, num_attention_heads)
        # The vendor's 13B class stored (False,) here, which is truthy: it always checkpointed.
        kwargs.pop("gradient_checkpointing", None)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        inferred = infer_position_embedding(max_position_embeddings, model_max_length)
        self.position_embedding = position_embedding or inferred
        self.lm_head = lm_head or infer_lm_head(vocab_size, z_loss_weight)
        # Absent stays absent: the vendor's own code reads the presence of these two keys.
        if max_position_embeddings is not None:
            self.max_position_embeddings = max_position_embeddings
        if model_max_length is not None:
            self.model_max_length = model_max_length
        # The key alone marks a Baichuan2 model, so the others are saved without it.
        if self.lm_head == "norm" or z_loss_weight:
            self.z_loss_weight = z_loss_weight or 0.0
        if z_loss_kind is not None:
            self.z_loss_kind = z_loss_kind
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._check()
        super().__init__(  # type: ignore[call-arg]
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def context_length(self):
        """Trained context in tokens."""
        return getattr(self, "model_max_length", None) or self.max_position_embeddings

    def _check(self):
        for name, value, known in (
            ("position_embedding", self.position_embedding, POSITION_EMBEDDINGS),
            ("lm_head", self.lm_head, LM_HEADS),
            ("z_loss_kind", self.z_loss_kind, ("max", "logsumexp")),
            ("hidden_act", self.hidden_act, ("silu",)),
            ("tie_word_embeddings", self.tie_word_embeddings, (False,)),
        ):
            if value not in known:
                raise ValueError(
                    f"config {name} is {value!r}; a Baichuan model has {' or '.join(map(repr, known))}"
                )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"config pad_token_id is {self.pad_token_id}; it must be below vocab_size {self.vocab_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


# Baichuan-7B's files spell the class names this way.
BaiChuanConfig = BaichuanConfig
