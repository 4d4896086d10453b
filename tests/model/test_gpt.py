"""The GPT against independent implementations and against what a causal model must satisfy."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moelab.config import ModelConfig, MoEConfig
from moelab.model import GPT
from moelab.presets import ARMS, arm_model

SMALL = ModelConfig(layers=3, heads=4, width=32, context=20, vocabulary=96)
MODERN = replace(SMALL, positions="rope", norm="rmsnorm", bias=False, activation="swiglu", tied_head=False)
MOE = MoEConfig(experts=4, top_k=2)


def tokens(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize(model: torch.nn.Module) -> None:
    """Biases and norms too, so that each of them matters."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize(("ours", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("silu", "silu")])
def test_forward_and_gradients_are_gpt2s(ours: str, theirs: str) -> None:
    model = GPT(replace(SMALL, activation=ours), dtype=torch.float64)
    randomize(model)
    oracle = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96, n_positions=20, n_embd=32, n_layer=3, n_head=4, activation_function=theirs,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    ).double()  # fmt: skip
    pairs = [
        (oracle.transformer.wte.weight, model.token_embedding),
        (oracle.transformer.wpe.weight, model.position_embedding),
    ]
    for block, theirs_block in zip(model.blocks, oracle.transformer.h, strict=True):
        attention, mlp = block.attention, block.feed_forward
        pairs += [
            (theirs_block.ln_1.weight, block.attention_norm.weight),
            (theirs_block.ln_1.bias, block.attention_norm.bias),
            (theirs_block.ln_2.weight, block.feed_forward_norm.weight),
            (theirs_block.ln_2.bias, block.feed_forward_norm.bias),
            (theirs_block.attn.c_attn.weight, attention.w_qkv), (theirs_block.attn.c_attn.bias, attention.b_qkv),
            (theirs_block.attn.c_proj.weight, attention.w_out), (theirs_block.attn.c_proj.bias, attention.b_out),
            (theirs_block.mlp.c_fc.weight, mlp.w_in), (theirs_block.mlp.c_fc.bias, mlp.b_in),
            (theirs_block.mlp.c_proj.weight, mlp.w_out), (theirs_block.mlp.c_proj.bias, mlp.b_out),
        ]  # fmt: skip
    final = oracle.transformer.ln_f
    pairs += [(final.weight, model.final_norm.weight), (final.bias, model.final_norm.bias)]
    transposed = {id(t) for t, _ in pairs if t.ndim == 2} - {id(pairs[0][0]), id(pairs[1][0])}  # Conv1D is (in, out)
    assert len(pairs) == len(list(model.parameters()))
    with torch.no_grad():
        for t, m in pairs:
            t.copy_(m.T if id(t) in transposed else m)
    ids, targets = tokens()[:, :-1], tokens()[:, 1:]
    found, expected = model(ids).logits, oracle(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    model(ids, targets).loss.backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for t, m in pairs:
        torch.testing.assert_close(m.grad, t.grad.T if id(t) in transposed else t.grad, rtol=1e-8, atol=1e-10)


def test_forward_of_the_modern_settings_is_llamas() -> None:
    model = GPT(replace(MODERN, hidden=48), dtype=torch.float64)
    randomize(model)
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=20, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )
    ).double()  # fmt: skip
    with torch.no_grad():
        oracle.model.embed_tokens.weight.copy_(model.token_embedding)
        oracle.lm_head.weight.copy_(model.head)
        oracle.model.norm.weight.copy_(model.final_norm.weight)
        for block, layer in zip(model.blocks, oracle.model.layers, strict=True):
            layer.input_layernorm.weight.copy_(block.attention_norm.weight)
            layer.post_attention_layernorm.weight.copy_(block.feed_forward_norm.weight)
            attention = layer.self_attn
            for part, w in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj), block.attention.w_qkv.chunk(3), strict=True
            ):
                part.weight.copy_(w)
            attention.o_proj.weight.copy_(block.attention.w_out)
            gate, value = block.feed_forward.w_in.chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(value)
            layer.mlp.down_proj.weight.copy_(block.feed_forward.w_out)
    torch.testing.assert_close(model(tokens()).logits, oracle(tokens()).logits, rtol=1e-6, atol=1e-6)  # fp32 angles


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("config", [SMALL, MODERN], ids=["gpt2", "modern"])
def test_no_logit_depends_on_a_later_token(arm: str, config: ModelConfig) -> None:
    model = GPT(arm_model(arm, config, MOE), dtype=torch.float64)
    ids = tokens(1)
    before = model(ids).logits
    for place in (1, 7, 19):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 96
        after = model(changed).logits
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, place:], before[:, place:])


@pytest.mark.parametrize("config", [SMALL, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("cut", [[20], [1] * 20, [7, 1, 1, 8, 3]], ids=str)
def test_the_cache_changes_nothing(config: ModelConfig, cut: list[int]) -> None:
    model = GPT(arm_model("moe", config, MOE), dtype=torch.float64)
    ids, cache = tokens(), model.new_cache(2)
    parts = [model(part, cache=cache).logits for part in ids.split(cut, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-6, atol=1e-6)


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="21 tokens: the context is 20"):
        GPT(SMALL)(tokens(length=21))


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_expert_with_top_1_is_the_dense_model(backend: str, activation: str) -> None:
    config = replace(SMALL, activation=activation)
    dense = GPT(config, dtype=torch.float64, seed=5)
    moe = GPT(replace(config, moe=MoEConfig(1, 1, backend=backend)), dtype=torch.float64, seed=5)
    ids, targets = tokens()[:, :-1], tokens()[:, 1:]
    left, right = dense(ids, targets), moe(ids, targets)
    torch.testing.assert_close(right.loss, left.loss, rtol=1e-12, atol=0)
    left.loss.backward()
    right.loss.backward()
    gradients = {n.replace(".experts.", "."): p.grad for n, p in moe.named_parameters() if "router" not in n}
    for name, p in dense.named_parameters():
        torch.testing.assert_close(gradients[name].view_as(p.grad), p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_share_the_initial_values_of_the_parameters_they_share(arm: str) -> None:
    dense = dict(GPT(SMALL, seed=4).named_parameters())
    other = dict(GPT(arm_model(arm, SMALL, MOE), seed=4).named_parameters())
    shared = {n for n in dense.keys() & other.keys() if dense[n].shape == other[n].shape}
    assert {n for n in dense if "feed_forward." not in n} <= shared
    assert all(torch.equal(dense[n], other[n]) for n in shared)


def test_a_value_is_drawn_from_the_seed_and_the_parameters_name_whatever_is_drawn_beside_it() -> None:
    model = GPT(arm_model("moe", SMALL, MOE), seed=4)
    residual = 0.02 / math.sqrt(2 * SMALL.layers)
    names = {"token_embedding": 0.02, "blocks.1.feed_forward.router.weight": 0.02}
    names |= {f"blocks.{i}.feed_forward.experts.w_out": residual for i in range(SMALL.layers)}
    for name, deviation in names.items():
        draw = hashlib.sha256(f"4 {name.replace('.experts.', '.')}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(draw[:7], "big"))
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, deviation * torch.randn(parameter.shape, generator=generator)), name


def test_seeds_differ_and_repeat() -> None:
    a, b, c = (GPT(SMALL, seed=s).token_embedding for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_initial_values_are_gpt2s_with_residual_projections_scaled() -> None:
    model = GPT(arm_model("moe", replace(SMALL, width=128, layers=8), MOE))
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("b"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        else:
            expected = 0.02 / 4 if leaf == "w_out" else 0.02  # √(2·8) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.1), name


def test_losses_are_apart_and_the_reported_one_is_cross_entropy_alone() -> None:
    model = GPT(arm_model("moe", SMALL, replace(MOE, balance_loss=100.0)), dtype=torch.float64)
    ids, targets = tokens()[:, :-1], tokens()[:, 1:]
    out = model(ids, targets)
    by_hand = -torch.log_softmax(model(ids).logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(out.loss, by_hand)
    torch.testing.assert_close(model(ids, targets, reduction="none").loss.mean(), by_hand)
    assert out.expert_counts.shape == (3, 4)


def test_only_the_layers_that_the_pattern_names_are_moe() -> None:
    model = GPT(replace(SMALL, moe=replace(MOE, moe_layers="every 2nd")))
    assert ["router.weight" in dict(b.feed_forward.named_parameters()) for b in model.blocks] == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_and_loss_stay_fp32_whatever_the_products(dtype: torch.dtype) -> None:
    model = GPT(arm_model("moe", SMALL, MOE), dtype=dtype)
    out = model(tokens()[:, :-1], tokens()[:, 1:])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {out.loss.dtype, out.balance_loss.dtype, out.z_loss.dtype} == {torch.float32}
    exact = GPT(arm_model("moe", SMALL, MOE))(tokens()[:, :-1], tokens()[:, 1:])
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=2e-3)


def test_the_model_traces_into_one_graph_at_any_length() -> None:
    model = GPT(arm_model("moe", SMALL, MOE))
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (19, 12):  # the second length is traced as a symbol
        ids, targets = tokens()[:, :length].contiguous(), tokens()[:, 1 : length + 1].contiguous()
        assert traced(ids, targets).loss.item() == pytest.approx(model(ids, targets).loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        (SMALL, 3),  # the embedding, a block, the head with the loss
        (MODERN, 3),
        (arm_model("moe", SMALL, MOE), 3),
        (arm_model("moe", SMALL, replace(MOE, capacity_factor=1.0)), 3),
        (arm_model("moe", SMALL, replace(MOE, moe_layers="every 2nd")), 4),
    ],
    ids=["dense", "modern", "moe", "capacity", "every other"],
)
@pytest.mark.parametrize("recomputing", [False, True], ids=["kept", "recomputed"])
def test_compiled_blocks_that_are_alike_are_one_graph(config: ModelConfig, graphs: int, recomputing: bool) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = GPT(config, torch.float64, checkpoint_activations=recomputing)
    randomize(model)
    ids, targets = tokens()[:, :-1], tokens()[:, 1:]
    found = []
    for forward in (model, model.compiled(backend="aot_eager", fullgraph=True)):
        out = forward(ids, targets)
        loss = out.loss + out.balance_loss + out.z_loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((out.loss, out.balance_loss, out.z_loss, out.expert_counts, out.dropped, gradients))
    torch.testing.assert_close(found[1], found[0])
    assert counters["stats"]["unique_graphs"] == graphs


def test_decisions_are_kept_where_blocks_would_be_recomputed() -> None:
    model = GPT(arm_model("moe", SMALL, MOE), checkpoint_activations=True)
    out = model(tokens(), keep_routing=True)
    assert [routed.indices.shape for routed in out.routed] == [(40, 2)] * 3
    sum(routed.weights.sum() for routed in out.routed).backward()
    assert model.routers[0].weight.grad is not None
