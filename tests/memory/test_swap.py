"""Block swap: the same results as without it, in the right order, and a module that is as it was whatever happens."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.weights.lora.lora_files import random, write
from wan_core import add_vace, load_experts, load_model, load_text_encoder, nano, open_lora
from wan_core.conditioning import TextCondition, VaceCondition
from wan_core.dit import ModelInputs
from wan_core.memory import Layout, OneAtATime, Plan
from wan_core.memory.lanes import AtOnce
from wan_core.memory.layout import block_names
from wan_core.memory.pinning import Pinning
from wan_core.memory.swap import BlockSwap, Pool
from wan_core.pipeline import sample
from wan_core.sampling import Conditions, Guidance, Step, make_schedule

SHAPE = (1, 16, 2, 4, 4)
PLANS = [Layout(6, slots=1), Layout(6, slots=2), Layout(6, slots=3), Layout(1), Layout(4)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA with factors for linear layers, a change of a norm and one of the modulation."""
    torch.manual_seed(5)
    tensors = {}
    for index in range(6):
        block = f"diffusion_model.blocks.{index}"
        for layer in ("self_attn.q", "cross_attn.o"):
            tensors[f"{block}.{layer}.lora_A.weight"] = random(4, 128)
            tensors[f"{block}.{layer}.lora_B.weight"] = random(128, 4)
        tensors[f"{block}.self_attn.norm_q.diff"] = random(128) / 10
        tensors[f"{block}.modulation.diff"] = random(1, 6, 128) / 10
    return open_lora(write(tmp_path_factory.mktemp("loras") / "l.safetensors", tensors))


@pytest.fixture(params=["bf16", "fp8", "q8_0", "experts", "vace"])
def model(request, lora):
    """A nano model of each kind of weights, with a LoRA that holds for a part of the run."""
    made = {"bf16": load_model, "fp8": lambda **how: load_model(**how).quantised("fp8_scaled"),
            "q8_0": lambda **how: load_model(**how).quantised("q8_0"), "experts": load_experts,
            "vace": lambda **how: add_vace(load_model(**how), "nano")}[request.param](placement=OneAtATime("cpu"))
    return made.with_lora(lora, 0.7, start=0.95, end=0.3)


def run(model, plan=Layout(), on_block=None, **how):
    """A guided run of four steps that passes the boundary of the experts and both ends of the LoRA's range."""
    beside = ()
    if model.spec.vace_layers:
        beside = (VaceCondition(randn(1, 96, *SHAPE[2:], seed=4), 1.0),)
    conditions = Conditions([TextCondition(randn(1, 5, 96, seed=2), beside=beside)],
                            [TextCondition(randn(1, 3, 96, seed=3), beside=beside)])
    return sample(replace(model, plan=Plan(plan)), torch.zeros(SHAPE), make_schedule("unipc", 4, 3.0), conditions,
                  Guidance(3.0, 2.0), noise=randn(*SHAPE), on_block=on_block, **how)


def test_swapped_is_resident_bit_for_bit(model):
    """Promise: whatever the weights' format, with LoRAs, expert pair and VACE blocks, a swapped run is the same run."""
    expected = run(model)
    for layout in PLANS:
        assert torch.equal(run(model, layout), expected), layout
    assert torch.equal(run(model), expected), "and so is a resident one after it"


def test_recovered_is_resident_bit_for_bit(model, caplog):
    """Promise: where memory runs out in the middle of a block, twice, the run goes on with more blocks swapped and is
    the same run, for every kind of weights, with LoRAs, expert pair and VACE blocks."""
    expected, failures = run(model), []

    def fail(*_):
        if len(failures) < 2:
            failures.append(1)
            raise torch.OutOfMemoryError("injected")

    def watch(block):
        # The module is built anew after each failure, and begins with this block.
        if block == 3:
            model.placement._held.module.blocks[3].register_forward_pre_hook(fail)

    assert torch.equal(run(model, on_block=watch), expected) and len(failures) == 2
    told = [record.message.partition(". ")[2] for record in caplog.records if "out of memory" in record.message]
    assert [text[:6] for text in told] in (["2 of 6", "4 of 6"], ["2 of 8", "4 of 8"], ["3 of 9", "6 of 9"])


def test_the_master_is_the_mapped_file(lora):
    """Promise: between calls a swapped module has its own tensors, on the host and unchanged, and nothing else."""
    model = load_model(placement=OneAtATime("cpu"), dtype="bfloat16")
    model = replace(model, plan=Plan(Layout(6)))
    module = model.get("low")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    run(model, Layout(6))
    assert model.get("low") is module
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    run(model.with_lora(lora), Layout(6))
    assert module is model.get("low") and {name: t.data_ptr() for name, t in module.state_dict().items()} == {
        name: pointer for name, (pointer, _) in before.items()}


class Failure(Exception):
    """Raised in the middle of a block."""


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", [Failure, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["self_attn.o", "ffn.2", "before"])
def test_a_block_that_fails_leaves_all_as_it_was(where, kind, slots):
    """Promise: after an error or an interrupt from the keyboard within a block, or between two, the next run is as if
    it had not been."""
    model = load_model(placement=OneAtATime("cpu"))
    expected = run(model, Layout(6, slots))
    swapped = replace(model, plan=Plan(Layout(6, slots)))
    if where == "before":
        def stop(block):
            if block == 3:
                raise kind

        with pytest.raises(kind):
            run(model, Layout(6, slots), on_block=stop)
    else:
        def fail(*_):
            raise kind

        hook = swapped.get("low").get_submodule(f"blocks.3.{where}").register_forward_pre_hook(fail)
        with pytest.raises(kind):
            run(model, Layout(6, slots))
        hook.remove()
    assert torch.equal(run(model, Layout(6, slots)), expected)


class LastMoment(AtOnce):
    """A device that keeps every freedom it has: copies end only when they are waited for, and until then the slot
    holds NaN; a copy that does not wait for the last computing from its slot is an error."""

    def __init__(self):
        self.now, self.pending, self.log = 0, {}, []
        self.used = {}

    def copy(self, copies, after):
        self.now += 1
        pairs = copies()
        for _, target in pairs:
            target.view(torch.uint8).fill_(255)
            last = self.used.get(target.untyped_storage().data_ptr())
            assert after is not None, "the copy does not wait for what used the memory before"
            assert last in (None, after), "the copy does not wait for the block that was there"
        self.pending[self.now] = pairs
        self.log.append(("copy", self.now))
        return self.now

    def mark(self):
        self.now += 1
        return self.now

    def wait(self, mark):
        for source, target in self.pending.pop(mark, ()):
            target.copy_(source)
        self.log.append(("wait", mark))

    def computed(self, block):
        self.used[block.storages[-1]] = self.now
        self.log.append(("compute", None))

    def late(self):
        """How many copies were waited for without any computing since they were asked for."""
        began = {mark: index for index, (kind, mark) in enumerate(self.log) if kind == "copy"}
        first = {mark: index for index, (kind, mark) in reversed(list(enumerate(self.log))) if kind == "wait"}
        return sum(("compute", None) not in self.log[began[mark]:first[mark]] for mark in began.keys() & first.keys())

    def finish(self):
        for mark in list(self.pending):
            self.wait(mark)


class Ordinary(Pinning):
    """Hands out host memory as a driver would pin it."""

    def take(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)


class Watched(nn.Module):
    """A block that notes which storage it computes from."""

    def __init__(self, seed):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))
        self.storages = []

    def forward(self, x):
        self.storages.append(self.linear.weight.untyped_storage().data_ptr())
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 4, 1, 2, 3), (0, 1, 1, 3, 0, 4)], ids=str)
def test_copies_keep_the_two_orderings(slots, order):
    """Promise: no slot is overwritten before its block has computed, and none is computed from before it is full, in
    whatever order the blocks come; from the third pass on, every copy begins while another block computes."""
    torch.manual_seed(0)
    blocks = [Watched(seed) for seed in range(5)]
    x = randn(2, 16)

    def pass_through():
        y = x
        for index in order:
            y = blocks[index](y)
        return y

    with torch.no_grad():
        expected = pass_through()
        lane = LastMoment()
        pool = Pool(torch.device("cpu"), slots, lane)
        swap = BlockSwap(blocks, pool)
        for block in blocks:
            # Runs behind the swap's own hook, which has set the mark.
            block.register_forward_hook(lambda block, _x, _y: lane.computed(block))
            block.storages.clear()
        # Where the last block leads is learnt when the second pass begins.
        for _ in range(2):
            assert torch.equal(pass_through(), expected)
        early = lane.late()
        for _ in range(3):
            assert torch.equal(pass_through(), expected)
        assert len({storage for block in blocks for storage in block.storages}) == slots
        if slots > 1 and len(set(order)) == len(order):
            assert lane.late() == early <= len(order) + 1
        swap.close()
        assert torch.equal(pass_through(), expected)


def test_the_next_expert_arrives_while_the_first_still_computes():
    """Promise: when the experts change, the first blocks of the next one are on their way before the first is dropped,
    in the same slots."""
    model = replace(load_experts(placement=OneAtATime("cpu")), plan=Plan(Layout(6)))
    expected, seen = run(load_experts(placement=OneAtATime("cpu"))), []
    placement = model.placement

    def on_step(step: Step):
        pool = placement._pool
        seen.append((step.expert, [slot.unit in placement._expected.swap._next for slot in pool.slots]
                     if placement._expected else None, id(pool)))

    assert torch.equal(run(model, Layout(6), on_step=on_step), expected)
    experts = [expert for expert, _, _ in seen]
    last_high = experts.index("low") - 1
    assert seen[last_high][1] == [True, True] and {pool for *_, pool in seen} == {seen[0][2]}
    assert [arriving for _, arriving, _ in seen].count(None) == len(seen) - 1


def test_swapped_blocks_are_spread():
    """Promise: blocks that stay stand between those that are swapped, and all blocks of a branch count."""
    module = add_vace(load_model(), nano.VACE_MODULE).low.hollow()
    names = block_names(module)
    assert names[:6] == [f"blocks.{i}" for i in range(6)] and names[6].startswith("vace_blocks.")
    half = Layout(len(names) // 2).names(module)
    assert len(half) == len(names) // 2 and not any(
        names.index(a) + 1 == names.index(b) for a, b in zip(half, half[1:]))
    assert Layout(999).names(module) == tuple(names) and Layout().names(module) == ()


@pytest.mark.parametrize("wrong", [{"swapped": -1}, {"slots": 0}, {"pinned": -5}])
def test_impossible_layouts_are_refused(wrong):
    """Promise: a layout that cannot be is an error when it is made."""
    with pytest.raises(ValueError, match="is no layout: expected"):
        Layout(**wrong)


def test_inputs_on_the_device_meet_weights_on_the_device():
    """Promise: what prepares text and image is never swapped, so it is there before the first block runs."""
    model = replace(load_model(placement=OneAtATime("cpu")), plan=Plan(Layout(6)))
    module = model.get("low")
    with torch.no_grad():
        velocity = module(ModelInputs(randn(*SHAPE), torch.tensor([500.0]), module.prepare_text(randn(1, 4, 96))))
    assert velocity.isfinite().all()


def test_pinned_memory_stays_pinned():
    """Promise: what is pinned stays so as long as the blocks come and go, is what the file holds, and is released with
    them."""
    torch.manual_seed(0)
    blocks, x = [Watched(seed) for seed in range(3)], randn(2, 16)
    with torch.no_grad():
        expected = [block(x) for block in blocks]
        swap = BlockSwap(blocks, Pool(torch.device("cpu"), 2), Ordinary(torch.device("cpu"), 1 << 20))
        pinning = weakref.ref(swap._pinning)
        for _ in range(3):
            assert all(torch.equal(block(x), y) for block, y in zip(blocks, expected))
    assert pinning() is not None
    swap.close()
    del swap
    gc.collect()
    assert pinning() is None


class Threaded(AtOnce):
    """Copies in a thread of their own, as beside a GPU."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)

    def copy(self, copies, after):
        return self.thread.submit(lambda: [target.copy_(source) for source, target in copies()])

    def wait(self, mark):
        mark.result()

    def finish(self):
        self.thread.submit(int).result()


@pytest.mark.parametrize("pinned", [False, True])
def test_in_inference_mode(pinned):
    """Promise: in inference mode, which ComfyUI runs nodes in and the thread that copies is not in, it is the same."""
    torch.manual_seed(0)
    blocks, x = [Watched(seed) for seed in range(3)], randn(2, 16)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        expected = [block(x) for block in blocks]
        swap = BlockSwap(blocks, Pool(cpu, 2, Threaded()), Ordinary(cpu, 1 << 20) if pinned else None)
        for _ in range(3):
            assert all(torch.equal(block(x), y) for block, y in zip(blocks, expected))
        swap.close()


def test_slots_are_those_of_the_part():
    """Promise: larger slots of a part before are given back, and a pool that grows lets go of its old slots."""
    placement = OneAtATime("cpu")
    experts, text = load_experts(placement=placement), load_text_encoder(placement=placement)
    replace(experts, plan=Plan(Layout(6))).get("low")
    large = placement._pool.slots[0].buffer.nbytes
    replace(text, layout=Layout(2)).module()
    small = placement._pool.slots[0].buffer.nbytes
    assert small < large and placement._pool.slots[0].unit is None
    old = weakref.ref(placement._pool.slots[0].buffer)
    replace(experts, plan=Plan(Layout(6))).get("low")
    gc.collect()
    assert old() is None and placement._pool.slots[0].buffer.nbytes == large


def test_interrupted_and_closed():
    """Promise: after an interrupt from the keyboard within a block, closing and refitting leave the master in place."""
    def interrupt(*_):
        raise KeyboardInterrupt

    for ending in (BlockSwap.close, BlockSwap.refit):
        torch.manual_seed(0)
        blocks = [Watched(seed) for seed in range(3)]
        masters = [block.linear.weight for block in blocks]
        pool = Pool(torch.device("cpu"), 2)
        swap = BlockSwap(blocks, pool)
        hook = blocks[1].linear.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            for block in blocks:
                block(randn(2, 16))
        hook.remove()
        ending(swap)
        assert all(block.linear.weight is master for block, master in zip(blocks, masters))
        swap.close()
        again = BlockSwap(blocks, pool)
        assert all(block(randn(2, 16)).isfinite().all() for block in blocks)
        again.close()
