"""Text models of every kind: sites, exactness, masks of padding, copies, compilation."""

import copy
import pickle

import pytest
import torch
from reference import masked
from tiny_text import MASK, MODELS, PADDED, VOCABULARY, dream, euro_bert, llada, llada2, qwen3

import accel
from accel.choice import DENSE, Choice
from accel.errors import AccelError, UnsupportedModelError
from accel.layout import Layout
from accel.pattern import Window
from accel.pipelines.adapters import geometry_of, sites_of
from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.plan import Plan
from accel.recipes import RECIPES, recipe
from accel.schedule import Schedule

SITES = {
    "euro_bert": ("model.layers.{}.self_attn", 6, 8),
    "qwen3": ("model.layers.{}.self_attn", 6, 16),
    "llada": ("model.transformer.blocks.{}", 6, 8),
    "dream": ("model.layers.{}.self_attn", 6, 8),
    "llada2": ("model.layers.{}.attention", 6, 8),
}
BLOCK = (16, 16)
TOKENS, PAD = 70, 23
CHOICES = (Choice(Window(w=0.3)), Choice(Window(w=0.1)), DENSE)
TEXT = [name for name, found in RECIPES.items() if found.text]
CACHED = ("dkv", "fast_dllm", "flashblock", "sparse_dllm", "streaming_dllm")


def tokens_of(batch=2, length=TOKENS):
    return torch.randint(3, MASK, (batch, length), generator=torch.Generator().manual_seed(3))


def mask_of(name, pads=(0, PAD)):
    """A mask of padding on the left as this model takes it, and positions for it."""
    real = torch.arange(TOKENS) >= torch.tensor(pads)[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    mask = real[:, None, None] if name == "dream" else real.long()
    return {"attention_mask": mask, "position_ids": positions}


def plan_of(model, *choices, dense_start=0.0, **settings):
    geometry = geometry_of(model)
    heads = geometry.sites[0].heads
    chosen = tuple(choices[h % len(choices)] for h in range(heads))
    sites = {site.name: (chosen,) for site in geometry.sites}
    schedule = Schedule(dense_start=dense_start)
    return Plan.of("text", geometry, sites, block=BLOCK, schedule=schedule, **settings)


@torch.no_grad()
def logits_of(model, tokens, step=None, **call):
    if isinstance(model, type(qwen3())) and "is_causal" not in call:
        call["is_causal"] = False
    if step is None:
        return model(tokens, **call).logits
    with accel.step(step, 10):
        return model(tokens, **call).logits


def pipe_of(model, name):
    pipe = MaskedDiffusionPipeline(model, None, shift_logits=name == "dream", mask_token_id=MASK)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return MODELS[name]()


class TestSites:
    def test_they_are_found_by_name(self, name, model):
        pattern, heads, dim = SITES[name]
        found = sites_of(model)
        assert [site.name for site in found] == [pattern.format(i) for i in range(3)]
        assert {(site.heads, site.head_dim) for site in found} == {(heads, dim)}
        # the model is as it was
        assert logits_of(model, tokens_of()).equal(logits_of(MODELS[name](), tokens_of()))

    def test_every_site_is_taken_once(self, name, model):
        accel.enable(model, plan_of(model, DENSE), strict=True)
        logits_of(model, tokens_of(), 0)
        rows = accel.summary(model).rows
        assert [(row.site, row.calls) for row in rows] == [
            (site.name, 1) for site in sites_of(model)
        ]

    def test_what_has_no_site_is_refused(self):
        from transformers import MambaConfig, MambaForCausalLM

        small = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
        model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, **small))
        with pytest.raises(UnsupportedModelError):
            accel.enable(model, "sparsed")


class TestExact:
    def test_dense_plans_are_the_model(self, name, model):
        plain = MODELS[name]()
        accel.enable(model, plan_of(model, DENSE))
        assert torch.equal(logits_of(model, tokens_of(), 0), logits_of(plain, tokens_of()))
        assert torch.equal(logits_of(model, tokens_of()), logits_of(plain, tokens_of()))

    def test_disable_leaves_the_model(self, name, model):
        plain = MODELS[name]()
        before = [
            (part, sorted(module.__dict__), type(module)) for part, module in model.named_modules()
        ]
        accel.enable(model, plan_of(model, *CHOICES), guard=False)
        out = logits_of(model, tokens_of(), 0)
        # the mask of blocks of LLaDA2 is none that a sparse kernel honours
        assert torch.equal(out, logits_of(plain, tokens_of())) == (name == "llada2")
        accel.disable(model)
        after = [
            (part, sorted(module.__dict__), type(module)) for part, module in model.named_modules()
        ]
        assert after == before
        assert model.config._attn_implementation == plain.config._attn_implementation
        assert torch.equal(logits_of(model, tokens_of(), 0), logits_of(plain, tokens_of()))

    @pytest.mark.parametrize(
        ("make", "padded"),
        [
            *((make, False) for make in (euro_bert, qwen3, llada, dream)),
            *((MODELS[name], True) for name in PADDED),
        ],
        ids=lambda value: getattr(value, "__name__", f"padded={value}"),
    )
    def test_a_plan_is_the_model_under_its_mask(self, make, padded):
        name = make.__name__
        model, plain, call = make(), make(), mask_of(name) if padded else {}
        layouts = [Layout.of((1, 1, TOKENS))] * 2
        if padded:
            layouts[1] = Layout.join([("pad", PAD), (1, 1, TOKENS - PAD)])
        choices = tuple(CHOICES[h % 3] for h in range(6))
        sites = [site.name for site in sites_of(plain)]
        explicit = tuple(Choice(Window()) if c == DENSE else c for c in choices)
        with masked(plain, dict.fromkeys(sites, layouts), explicit, BLOCK) as met:
            expected = logits_of(plain, tokens_of(), **call)
        assert met == sites
        if name == "dream" and padded:
            # a mask of four axes does not say what is padding, so its user has to
            accel.enable(model, plan_of(model, *CHOICES), strict=True, guard=False, layout=layouts)
        else:
            accel.enable(model, plan_of(model, *CHOICES), strict=True, guard=False)
        out = logits_of(model, tokens_of(), 0, **call)
        rows = [slice(None), slice(PAD if padded else 0, None)]
        for sample in range(2):
            got, want = out[sample, rows[sample]], expected[sample, rows[sample]]
            assert torch.allclose(got, want, atol=2e-4, rtol=2e-4)
        dense = logits_of(make(), tokens_of(), **call)
        assert not torch.allclose(out[0], dense[0], atol=1e-2)


class TestRecipes:
    @pytest.mark.parametrize("chosen", TEXT)
    def test_they_run(self, name, model, chosen):
        """Without a word in strict mode, except on a model whose mask no kernel honours."""
        pipe, ids = pipe_of(model, name), tokens_of(length=33)
        plan = recipe(chosen, geometry_of(model))
        call = {"input_ids": ids, "gen_length": 9, "block_length": 4, "output_type": "ids"}
        before = pipe(**call).sequences
        if name == "llada2":
            accel.enable(pipe, plan, guard=False)
            if chosen in CACHED:
                with pytest.raises(AccelError, match="take a plan without a cache"):
                    pipe(**call)
                return
            out = pipe(**call).sequences
            assert torch.equal(out, before)
            assert bool(accel.summary(pipe).notices) == plan.wants_sparse
        else:
            accel.enable(pipe, plan, strict=True, guard=False)
            out = pipe(**call).sequences
            assert out.shape == (2, 9)
            assert not (out == MASK).any()
            assert not accel.summary(pipe).notices
            assert ("cached" in {r.phase for r in accel.summary(pipe).rows}) == (chosen in CACHED)
        accel.disable(pipe)
        assert torch.equal(pipe(**call).sequences, before)


class TestCopies:
    def test_they_are_plain(self, name, model):
        plain = logits_of(model, tokens_of())
        accel.enable(model, plan_of(model, *CHOICES), guard=False)
        own = logits_of(model, tokens_of(), 0)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits_of(twin, tokens_of(), 0), plain)
            # a name of accel's would be unknown where accel is not
            assert twin.config._attn_implementation == "sdpa"
            # and can be enabled by themselves
            accel.enable(twin, plan_of(twin, *CHOICES), guard=False)
            assert torch.equal(logits_of(twin, tokens_of(), 0), own)
            accel.disable(twin)
            assert torch.equal(logits_of(twin, tokens_of(), 0), plain)
        assert torch.equal(logits_of(model, tokens_of(), 0), own)

    @pytest.mark.parametrize("make", [euro_bert, qwen3], ids=lambda m: m.__name__)
    def test_a_saved_model_does_not_know(self, make, tmp_path):
        model = make()
        plain = logits_of(model, tokens_of())
        accel.enable(model, plan_of(model, *CHOICES), guard=False)
        model.save_pretrained(tmp_path)
        assert "accel" not in (tmp_path / "config.json").read_text()
        again = type(model).from_pretrained(tmp_path).eval()
        assert again.config._attn_implementation == "sdpa"
        assert torch.equal(logits_of(again, tokens_of(), 0), plain)


@pytest.mark.parametrize("make", [euro_bert, qwen3], ids=lambda m: m.__name__)
class TestAttentionInterface:
    @pytest.mark.parametrize("own", ["sdpa", "eager"])
    @pytest.mark.parametrize("choices", [(DENSE,), (Choice(Window()),), CHOICES], ids=len)
    def test_padding_is_honoured(self, make, own, choices):
        model = make()
        model.set_attn_implementation(own)
        call = mask_of(make.__name__)
        plain = logits_of(model, tokens_of(), **call)
        accel.enable(model, plan_of(model, *choices), strict=True, guard=False)
        assert model.config._attn_implementation == f"accel_{own}"
        out = logits_of(model, tokens_of(), 0, **call)
        alone = logits_of(model, tokens_of()[1:, PAD:], 0)
        assert torch.allclose(out[1, PAD:], alone[0], atol=2e-4, rtol=2e-4)
        if choices == (DENSE,):
            assert torch.equal(out, plain)
        changed = tokens_of()
        changed[1, :PAD] = 5
        again = logits_of(model, changed, 0, **call)
        assert torch.equal(again[1, PAD:], out[1, PAD:])
        assert torch.equal(again[0], out[0])

    def test_attention_maps(self, make):
        """`output_attentions` gives what it gave; such calls are dense."""
        model = make()
        model.set_attn_implementation("eager")
        plain = model(tokens_of(), output_attentions=True).attentions
        accel.enable(model, plan_of(model, *CHOICES), guard=False)
        maps = model(tokens_of(), output_attentions=True).attentions
        assert len(maps) == 3
        assert all(map(torch.equal, maps, plain))

    @pytest.mark.parametrize("other", ["eager", "sdpa"])
    def test_another_attention_is_chosen_afterwards(self, make, other, caplog):
        """It is taken over, with the plan; what is disabled is that one."""
        model, plain = make(), make()
        plain.set_attn_implementation(other)
        accel.enable(model, plan_of(model, *CHOICES), strict=True, guard=False)
        out = logits_of(model, tokens_of(), 0)
        model.set_attn_implementation(other)
        again = logits_of(model, tokens_of(), 1)
        assert "attention was replaced after accel.enable" in caplog.text
        assert torch.allclose(again, out, atol=1e-4)
        assert model.config._attn_implementation == f"accel_{other}"
        accel.disable(model)
        assert model.config._attn_implementation == other
        assert torch.equal(logits_of(model, tokens_of()), logits_of(plain, tokens_of()))

    def test_other_models_of_the_class_are_as_they_were(self, make):
        model, other = make(), make()
        before = logits_of(other, tokens_of(), 0)
        accel.enable(model, plan_of(model, *CHOICES), guard=False)
        assert torch.equal(logits_of(other, tokens_of(), 0), before)
        assert other.config._attn_implementation == "sdpa"

    def test_gradients_are_the_models(self, make):
        model, plain = make(), make()
        accel.enable(model, plan_of(model, *CHOICES), guard=False)
        grads = []
        for one in (model, plain):
            with accel.step(0, 10):
                one(tokens_of()).logits.square().mean().backward()
            grads.append([p.grad for p in one.parameters()])
        assert all(map(torch.equal, *grads))
        assert "needs gradients" in str(accel.summary(model).notices)


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompiled:
    def test_no_step_or_plan_compiles_anew(self):
        """As many graphs as the untouched model has, and one for the start of the call."""

        def run(model):
            return [logits_of(model, tokens_of(), step, **call) for step in (0, 3, 4, 9)]

        call = mask_of("euro_bert")
        plain, backend = euro_bert(), Counting()
        dense = run(plain)
        plans = [plan_of(plain, *choices, dense_start=0.2) for choices in (CHOICES, (DENSE,))]
        expected = []
        for plan in plans:
            with accel.enabled(plain, plan, strict=True, guard=False):
                expected.append(run(plain))
        plain.compile(backend=backend, fullgraph=True)
        run(plain)
        graphs = backend.graphs
        model, backend = euro_bert(), Counting()
        accel.enable(model, plans[0], strict=True, guard=False)
        model.compile(backend=backend, fullgraph=True)
        for plan, outs in zip(plans, expected, strict=True):
            accel.enable(model, plan, strict=True, guard=False)
            for got, want in zip(run(model), outs, strict=True):
                assert torch.allclose(got, want, atol=2e-4, rtol=2e-4)
        assert backend.graphs <= graphs + 1
        accel.disable(model)
        for got, want in zip(run(model), dense, strict=True):
            assert torch.allclose(got, want, atol=2e-4, rtol=2e-4)

    @pytest.mark.parametrize("make", [qwen3, llada, dream, llada2], ids=lambda m: m.__name__)
    def test_others_run(self, make):
        """Remote code that calls SDPA by itself breaks its graph there."""
        model = make()
        accel.enable(model, plan_of(model, *CHOICES), guard=False)
        expected = [logits_of(model, tokens_of(), step) for step in range(2)]
        model.compile(backend=Counting())
        for step, want in enumerate(expected):
            got = logits_of(model, tokens_of(), step)
            assert torch.allclose(got, want, atol=2e-4, rtol=2e-4)

    def test_a_compiled_model_in_the_pipeline(self):
        model = euro_bert(num_hidden_layers=1)
        pipe, call = pipe_of(model, "euro_bert"), {"gen_length": 6, "output_type": "ids"}
        ids = tokens_of(length=20)
        accel.enable(pipe, recipe("sparse_dllm", geometry_of(model), block_length=3), strict=True)
        expected = pipe(input_ids=ids, **call).sequences
        model.compile(backend=Counting())
        assert torch.equal(pipe(input_ids=ids, **call).sequences, expected)
        assert "cached" in {row.phase for row in accel.summary(pipe).rows}
