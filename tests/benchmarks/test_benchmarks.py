"""The benchmarks' own logic: what finds a fault must find it, and what prints a figure must print the right one."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import minidiff
from benchmarks import load
from benchmarks.parity import components, locate, page, pictures
from benchmarks.parity.__main__ import main as parity
from benchmarks.parity.both import Both
from benchmarks.speed import __main__ as speed
from benchmarks.speed import growth, host, memory, networks, plots, processes, report, settings, whole
from benchmarks.speed.timing import Measured, in_turn, name_of
from tests.theirs import carry_over, diffusers, randomize, transformers
from tests.tiny import TEXT, UNET, VAE, save_tiny
from tests.tiny_xl import BASE_UNET, SECOND


@dataclasses.dataclass
class Parts:
    """A pipeline, as far as the comparison of networks looks at it."""

    components: dict

    def __getattr__(self, name):
        return self.components[name]


@pytest.fixture(scope="module")
def both():
    text = transformers.CLIPTextConfig(**TEXT, vocab_size=600)
    theirs = {
        "unet": randomize(diffusers.UNet2DConditionModel(**UNET), seed=1),
        "vae": randomize(diffusers.AutoencoderKL(**VAE), seed=2),
        "text_encoder": randomize(transformers.CLIPTextModel(text), seed=3),
    }
    ours = {
        "unet": minidiff.UNet2DConditionModel(**UNET),
        "vae": minidiff.AutoencoderKL(**VAE),
        "text_encoder": minidiff.CLIPTextModel(minidiff.CLIPTextConfig(**TEXT, vocab_size=600)),
    }
    return Both(Parts({name: carry_over(theirs[name], one) for name, one in ours.items()}), Parts(theirs))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_first_wrong_layer_is_named(part, both):
    ours, theirs = both.networks()[part]
    assert locate.first_departure(ours, theirs) is None
    broken = copy.deepcopy(ours)
    state = torch.nn.Module.state_dict(broken)
    first, second = pair_of_equal_shape(part, state)
    state[first], state[second] = state[second].clone(), state[first].clone()
    broken.load_state_dict(state)
    found = locate.first_departure(broken, theirs)
    assert found.module == first.rpartition(".")[0]
    assert found.weights_differ == [first]
    assert found.input_relative <= 1e-12
    row = next(row for row in ours.rows() if first in row.ours)
    assert (first, row.hub[0], row.ldm[0]) in found.names or len(row.hub) > 1
    text = locate.describe(found, part)
    assert first in text and row.hub[0] in text and row.ldm[0] in text


def pair_of_equal_shape(part, state):
    """Two weights of one shape that are used one after the other."""
    wanted = {"unet": "up.1.res.", "vae": "decoder.up.2.res.", "text_encoder": "layers."}[part]
    end = {"unet": "conv2.weight", "vae": "conv2.weight", "text_encoder": "norm1.weight"}[part]
    names = [name for name in state if name.startswith(wanted) and name.endswith(end)]
    return names[0], names[1]


def test_components_are_compared(both):
    rows = list(components.compare(both, ("float64", "float32", "bfloat16"), torch.device("cpu")))
    outputs = {row.what for row in rows}
    assert {
        "unet: prediction",
        "unet: prediction, optimized",
        "vae: picture of latents",
        "text_encoder: pooled",
    } <= outputs
    bounds = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.2}
    assert all(row.relative <= bounds[row.dtype] for row in rows)
    precise, coarse = (
        next(r for r in rows if (r.what, r.dtype) == ("unet: prediction", d)) for d in ("float32", "bfloat16")
    )
    assert 1e-8 < precise.their_precision < coarse.their_precision / 100  # a copy was rounded, not the network
    text = components.table(rows)
    assert text.count("\n") == len(rows) + 1

    wrong = copy.deepcopy(both.ours.components["vae"])
    wrong.decoder.conv_in.bias.data += 0.01
    rows = list(components.compare(Both(Parts({"vae": wrong}), both.theirs), ("float64",), torch.device("cpu")))
    assert {row.what: row.relative > 1e-9 for row in rows} == {
        "vae: moments of a picture": False,
        "vae: picture of latents": True,
    }


def test_pictures_and_page():
    a, b = Image.new("RGB", (4, 4), (10, 20, 30)), Image.new("RGB", (4, 4), (10, 20, 30))
    b.putpixel((1, 2), (10, 22, 30))
    different = pictures.Picture("a <scheduler>", a, b)
    assert different.levels.max() == 2 and different.amplified.getpixel((1, 2)) == (0, 102, 0)
    assert "| a <scheduler> | 2 | 1 of 48 | no |" in pictures.table([different])
    assert "| same | 0 | 0 of 48 | yes |" in pictures.table([pictures.Picture("same", a, a)])
    text = page.page("title", [("Tables", "| x | y |\n|---|---|\n| 1 | 2 |"), ("Text", "a & b")], [different])
    assert "<th>x</th><th>y</th>" in text and "<td>1</td><td>2</td>" in text
    assert "a &amp; b" in text and "a &lt;scheduler&gt;" in text and text.count("data:image/png;base64,") == 3


def test_speed_figures():
    row = Measured("unet", "sd15 UNet step, guided, 1 x 512x512", "float32", {}, flop=4e9)
    row.figures = {
        "ours": [4.0, 4.0, 5.0],
        "ours, optimized": [2.0, 1.0, 2.0],
        "theirs": [4.0, 4.0, 4.0],
        "theirs, x": [8.0] * 3,
    }
    assert (row.best("ours"), row.best("theirs")) == ("ours, optimized", "theirs")
    assert row.ratio("ours, optimized", "theirs") == (0.5, 0.25, 0.5)
    text = report.table([row], {"float32": {"mm": 4.0}})
    assert "| 4.00 s, 2.00 s optimized | 4.00 s, 8.00 s x | 0.50 (0.25 to 0.50) | 2 GFLOP/s, 50% of the peak |" in text
    assert "| ours, optimized | theirs | 0.75 | 0.50 |" in report.bounds([row])
    row.figures["ours, optimized"] = [3.9] * 3
    assert "0.75 | 0.97 **not met** |" in report.bounds([row])


def test_bounds_of_a_gpu():
    row = Measured("whole", "sd15 whole run, 1 x 512x512, 50 steps", "float16", {})
    row.figures = {
        "ours": [0.8],
        "ours, optimized": [0.6],
        "ours, compiled": [0.5],
        "theirs": [1.0],
        "theirs, channels_last": [0.8],
        "theirs, compiled": [0.4],
    }
    rows = [line.split(" | ")[2:] for line in report.bounds([row], "cuda").splitlines()[2:]]
    assert [[*cells[:2], cells[3].removesuffix(" |")] for cells in rows] == [
        ["ours, optimized", "theirs", "0.60"],
        ["ours, optimized", "theirs, channels_last", "0.75 **not met**"],
        ["ours, compiled", "theirs, compiled", "1.25 **not met**"],
        ["ours, compiled", "theirs, channels_last", "0.62 **not met**"],
    ]
    assert [cells[2] for cells in rows] == ["0.7", "0.7", "1.0", "0.4"]
    assert report.bounds([row], "cpu").count("\n") == 1  # a bound of a GPU says nothing about a CPU
    for name in [name for name in row.figures if "compiled" in name]:
        del row.figures[name]
    assert report.bounds([row], "cuda").count("\n") == 3
    step = Measured("unet", "sd15 UNet step, guided, 1 x 512x512", "float16", {"ours": [1.0], "theirs": [1.0]})
    assert report.bounds([step], "cuda").count("\n") == 1


def test_in_turn():
    order = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The benchmark's arguments for a family "tiny"; "tiny_xl" is another, both with the tests' configurations."""
    vocabulary = {"vocab_size": 8192}  # the tokenizer is that of the embedded checkpoint
    parts = {
        "tiny/unet": {"in_channels": 4, **UNET},
        "tiny/vae": {"in_channels": 3, "latent_channels": 4, **VAE},
        "tiny/text_encoder": TEXT | vocabulary,
        "tiny_xl/unet": {"in_channels": 4, **BASE_UNET},
        "tiny_xl/vae": {"in_channels": 3, "latent_channels": 4, **VAE},
        "tiny_xl/text_encoder": TEXT | vocabulary,
        "tiny_xl/text_encoder_2": SECOND | vocabulary,
    }
    for part, fields in parts.items():
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    monkeypatch.setattr(settings, "FAMILIES", {name: name for name in ("tiny", "tiny_xl")})
    return "tiny", torch.float32, torch.device("cpu")


EAGER = {"ours", "ours, optimized", "theirs", "theirs, channels_last"}


def test_settings_share_their_weights(tiny):
    made = networks.build_unet(*tiny, compiled=True).networks
    assert set(made) == EAGER | {"ours, compiled", "theirs, compiled"}  # CUDA graphs are for a GPU
    assert all((network._compiled_call_impl is not None) == ("compiled" in name) for name, network in made.items())
    vae = networks.build_vae(*tiny, compiled=True, only=("ours", "ours, compiled")).networks
    assert {name: "decode" in vars(network) for name, network in vae.items()} == {"ours": False, "ours, compiled": True}
    places = {
        name: {p.data_ptr() for p in network.parameters() if p.ndim == 4 and p.shape[-1] == 3}
        for name, network in made.items()
    }
    assert places["ours"] == places["theirs"] == places["ours, optimized"]
    assert places["ours, compiled"] == places["theirs, compiled"] == places["theirs, channels_last"]
    assert not places["theirs"] & places["theirs, channels_last"]
    use = networks.step(*tiny, 1, 8)
    with torch.no_grad():
        outs = {name: use(network, name) for name, network in made.items() if "compiled" not in name}
    assert all(torch.allclose(out, outs["theirs"], atol=1e-5) for out in outs.values())


def test_a_setting_that_does_not_fit_is_left_out(tiny, monkeypatch):
    weights = list(networks.plain_unet("tiny").parameters())
    convolutions = sum(p.nbytes for p in weights if p.ndim == 4)
    free = sum(p.nbytes for p in weights) + convolutions
    for room, left_out in ((1.2 * free, []), (free, ["theirs, channels_last"])):  # a tenth is not counted upon
        monkeypatch.setattr(settings, "available", lambda device, room=room: room)
        made = networks.build_unet(*tiny)
        assert set(made.networks) == EAGER - set(left_out)
        assert [name for name in left_out if f"{name!r} is left out" in made.notes[0]] == left_out


class Doubling(torch.nn.Module):
    def forward(self, x):
        return 2 * x

    def decode(self, x):
        return x + x


def test_what_no_load_can_do_without(monkeypatch, tmp_path):
    """A converting load is reported beside the time that as much new memory takes; one as stored is not."""
    asked = []
    figures = {"seconds": 2.0, "peak_mb": 5.0, "weights_mb": 3.0}
    monkeypatch.setattr(load, "measure_apart", lambda model, side, kind, folder: asked.append(side) or figures)
    monkeypatch.setattr(load, "fresh_memory", lambda size, real=load.fresh_memory: real(size) + size)
    rows = list(processes._load(tmp_path, "bfloat16", "a model", 1))
    assert 3e6 < rows[0].figures[processes.FRESH][0] < 3e6 + 10  # the bytes of the weights, and a real time
    assert processes.FRESH not in rows[1].figures and set(asked) == {"ours", "theirs"}
    assert "| new memory of that size alone: 3000000." in report.table(rows, {})
    assert all(processes.FRESH not in row.figures for row in processes._load(tmp_path, "as stored", "a model", 1))


class Torn(Doubling):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def test_compiled_settings(tiny):
    """With the compiler's front end alone; ``test_compile`` shows that our networks pass it in one piece."""
    traced = []

    def backend(graph, inputs):
        traced.append(inputs[-1].shape[0])
        return graph.forward

    def broken(graph, inputs):
        raise RuntimeError("no such kernel")

    made = networks.build_text(*tiny)
    for setting, use in {
        "ours, compiled": backend,
        "theirs, compiled": backend,
        "theirs, compiled too": broken,
    }.items():
        made.networks[setting] = settings.compile_(Doubling(), ("forward", "decode"), {"backend": use})
    made.networks["ours, compiled in parts"] = settings.compile_(Torn(), ("forward",), {"backend": backend})
    del made.networks["ours"], made.networks["theirs"]
    for size in range(2, 12):
        x = torch.ones(size)
        runs = made.runs(lambda network, setting, x=x: network(x) + network.decode(x))
        assert list(runs) == ["ours, compiled", "theirs, compiled"]
    # Calls and decode, for every shape: torch alone would compile the second for any shape, and give up at the eighth.
    assert traced == [size for size in range(2, 12) for _ in range(2)]
    assert made.notes[0].startswith("'ours, compiled': the first run, with compiling, took ")
    assert "'theirs, compiled too' is left out, compiling failed" in made.notes[2] and "no such kernel" in made.notes[2]
    assert "'ours, compiled in parts' is left out" in made.notes[3]


class Asked:
    """A pipeline that tells what it was asked for."""

    vae_scale_factor = 8

    def __call__(self, prompt, **options):
        return {"prompt": prompt, **options}


@pytest.mark.parametrize("family", ["tiny", "tiny_xl"])
def test_whole_runs_of_a_family(family, tiny, monkeypatch):
    _, dtype, cpu = tiny
    pictures, draw = [], whole.draw
    monkeypatch.setattr(whole, "draw", lambda *args: pictures.append(draw(*args).images[0]))
    (row,) = whole.whole_runs(family, dtype, cpu, 1, 8, steps=3)
    assert set(row.figures) == EAGER and all(len(times) == 1 for times in row.figures.values())
    assert row.what == f"{family} whole run, 1 x 64x64, 3 steps"
    step, decode = (networks.count(networks.WORKS[name], family, 1, 8) for name in ("unet", "decode"))
    assert row.flop == 3 * step + decode
    levels = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int() for picture in pictures[-4:]]
    assert max((level - levels[0]).abs().max() for level in levels) <= 1  # all settings draw the same picture


def test_what_a_whole_run_asks_for(tiny):
    asked = whole.draw(Asked(), torch.device("cpu"), 7, 2, 64)
    wanted = {"prompt": [whole.PROMPT] * 2, "height": 512, "width": 512, "num_inference_steps": 7}
    assert all(asked[name] == value for name, value in wanted.items())
    assert asked["guidance_scale"] > 1 and asked["generator"].device.type == "cpu"
    assert [networks.works_of("text", family) for family in ("tiny", "tiny_xl")] == [["text"], ["text", "text_2"]]


def test_attention_is_counted(tiny):
    """On the CPU it is one kernel that torch's counter does not know."""
    wide = networks.count(networks.WORKS["unet"], "tiny", 1, 32) / networks.count(networks.WORKS["unet"], "tiny", 1, 16)
    assert wide > 4.2  # convolutions alone grow by 4


def test_growth_stops_where_the_next_would_not_fit(tiny, monkeypatch):
    work, made = networks.WORKS["decode"], networks.build_vae(*tiny)
    monkeypatch.setitem(networks.WORKS, "decode", work._replace(build=lambda *args, **options: made))
    row, cost = growth.measure(work, made, *tiny, 1, 2, 4)
    assert set(row.figures) == EAGER and row.case == {"batch": 2, "pixels": 32**2} and row.flop > 0
    assert cost.seconds == max(max(times) for times in row.figures.values())

    def measure(work, settings, family, dtype, device, rounds, batch, side):
        case = {"batch": batch, "pixels": side**2}
        cost = growth.Cost(seconds=batch * side**2, peak=1000 * batch * side**2)
        return Measured("growth", "case", name_of(dtype), {"ours": [1.0], "theirs": [1.0]}, case=case), cost

    monkeypatch.setattr(growth, "measure", measure)
    monkeypatch.setattr(growth, "available", lambda device: 500_000)
    found = list(growth.growth(("decode",), *tiny, 1, 8, longest=10**9))
    cases = [(one.case["batch"], one.case["pixels"]) for one in found if isinstance(one, Measured)]
    assert cases == [(1, 8**2), (2, 8**2), (4, 8**2), (1, 4**2), (1, 6**2), (1, 12**2), (1, 16**2)]
    assert [one.split(":")[0] for one in found if isinstance(one, str)] == [
        "growth stops before tiny VAE decode, 8 x 64x64 in float32",  # 1.25 x 512 kB
        "growth stops before tiny VAE decode, 1 x 192x192 in float32",  # 1.25 x 576 kB
    ]
    found = list(growth.growth(("decode",), *tiny, 1, 8, longest=150))
    cases = [(one.case["batch"], one.case["pixels"]) for one in found if isinstance(one, Measured)]
    assert cases == [(1, 8**2), (2, 8**2), (1, 4**2), (1, 6**2)]  # 64 s for 8 x 8; 12 x 12 may take 324 s

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(growth, "measure", fails)
    found = list(growth.growth(("decode",), *tiny, 1, 8, longest=10**9))
    assert found[0] == "growth stops before tiny VAE decode, 1 x 64x64 in float32: it failed: out of memory"


def test_growth_says_why_it_stops():
    cpu, cost = torch.device("cpu"), growth.Cost(seconds=10.0, peak=10**15)
    assert growth.too_much(cost, 2, 2, cpu, 60).startswith("it needs about 2.5e+06 GB beyond the weights, ")
    small = growth.Cost(seconds=10.0, peak=1)
    assert growth.too_much(small, 2, 4, cpu, 60) is None
    assert growth.too_much(small, 4, 16, cpu, 60) == "one run may take 160 s, more than --longest 60"


def test_curves_of_growth():
    def row(batch, pixels, ours, theirs):
        figures = {"ours": [0.1], "ours, optimized": [ours], "theirs": [theirs], "theirs, channels_last": [2 * theirs]}
        what = f"sd15 UNet step, guided, {batch} x {pixels}"
        return Measured("growth", what, "float32", figures, case={"batch": batch, "pixels": pixels})

    rows = [row(1, 10**6, 1.0, 2.0), row(4, 10**6, 2.0, 6.0), row(1, 250_000, 0.5, 0.75)]
    assert plots.batch_curve(rows, "ours") == ([1, 4], [1.0, 0.5])
    assert plots.batch_curve(rows, "theirs") == ([1, 4], [2.0, 1.5])
    assert plots.pixel_curve(rows, "ours") == ([0.25, 1.0], [2.0, 1.0])
    assert plots.pixel_curve(rows, "theirs") == ([0.25, 1.0], [3.0, 2.0])


def test_host_time(tiny, monkeypatch):
    monkeypatch.setattr(host, "NARROWER", 1)
    seconds, operators, kernels = host.host_time("tiny", 1)
    assert all(set(row.figures) == EAGER - {"theirs, channels_last"} for row in (seconds, operators, kernels))
    assert seconds.unit == "s" and operators.unit == kernels.unit == "operators"
    for name in operators.figures:
        assert 0 < kernels.median(name) < operators.median(name)
    assert kernels.median("ours, optimized") < kernels.median("ours") < kernels.median("theirs")
    with host.Count() as counted:
        torch.ones(4).view(2, 2).add_(1)
    assert (counted.operators, counted.kernels) == (3, 2)


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    def no_schedulers(rounds):
        yield "not all is well"
        raise ValueError("no schedulers")

    monkeypatch.setattr(speed, "SIDES", {"tiny": 8})
    monkeypatch.setattr(speed.peak, "measure", lambda dtype, device: {"mm": 100.0, "linear": 200.0})
    monkeypatch.setattr(speed.runs, "scheduler_steps", no_schedulers)
    for name in ("ratios", "growth"):  # what draws them need not be installed for tests
        monkeypatch.setattr(speed.plots, name, lambda rows, path: path.touch())
    options = ["--family", "tiny", "--dtype", "float32", "--rounds", "1", "--out", str(tmp_path / "out")]
    assert speed.main(["text", *options]) == 0
    assert speed.main(["scheduler", "text", *options]) == 1
    for text in (capsys.readouterr().out, (tmp_path / "out" / "speed.md").read_text()):
        assert "| tiny text encoder, 2 x 77 tokens | float32 |" in text and "| linear | 200 |" in text
        assert "* scheduler FAILED: ValueError: no schedulers" in text and f"threads {torch.get_num_threads()}" in text
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["part"] for row in found["rows"]] == ["text"] and len(found["notes"]) == 2
    assert found["machine"]["torch"] == torch.__version__ and (tmp_path / "out" / "speed.png").exists()


def test_the_command_line(capsys):
    assert speed.parse([]).parts == list(speed.PARTS) and speed.parse([]).dtype == ["float32", "bfloat16"]
    assert speed.parse(["growth", "host"]).parts == ["growth", "host"]
    for wrong, said in ((["unets"], "unknown part unets"), (["--device", "meta"], "no such device")):
        with pytest.raises(SystemExit):
            speed.parse(wrong)
        assert said in capsys.readouterr().err


def test_peak_memory(tiny):
    cpu = torch.device("cpu")
    assert 90e6 < settings.peak_of(lambda: torch.ones(25_000_000), cpu) < 130e6
    assert 0 <= memory.measure("whole", "ours, optimized", *tiny, 8) < 100
    scheduler = minidiff.DDIMScheduler()
    bytes_of_a_step = memory.step_bytes(scheduler)
    assert 1 < bytes_of_a_step / (4 * 4 * 64 * 64) < 10
    row = Measured("memory", "peak", "float32", {"ours": [1.0], "theirs": [20.0]}, unit="MB")
    assert memory._unless_small(row) is row
    row.figures["theirs"] = [2.0]
    assert "2.0 MB in diffusers, too little for resident memory" in memory._unless_small(row)


def test_a_whole_certificate(tmp_path, capsys):
    """A folder, the same as a single file, and a broken copy of the folder."""
    folder, single, broken = save_tiny(tmp_path / "hub"), tmp_path / "single.safetensors", tmp_path / "broken"
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    pipe.save_single_file(single)
    state = pipe.vae.state_dict()
    pipe.vae.load_state_dict(state | {"decoder.conv_in.bias": state["decoder.conv_in.bias"] + 0.1})
    pipe.save_pretrained(broken)

    options = ["--dtype", "float64", "--steps", "1", "--combinations", "0", "--out", str(tmp_path / "report")]
    assert parity([str(folder), *options]) == 0
    report = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert len(report["pictures"]) == 17 and max(p["levels"] for p in report["pictures"]) <= 1
    assert max(row["relative"] for row in report["networks"]) <= 1e-12
    assert "inpainting" in (tmp_path / "report" / "parity.md").read_text()
    assert (tmp_path / "report" / "parity.html").read_text().count("data:image/png") == 3 * 17

    assert parity([str(single), "--config", str(folder), *options]) == 0
    capsys.readouterr()
    assert parity([str(broken), "--reference", str(folder), *options]) == 1
    said = capsys.readouterr().out
    assert "the first that departs is decoder.conv_in " in said
    assert "these weights are not the reference's: decoder.conv_in.bias" in said


@pytest.mark.parametrize("name", ["reference_docs", "reference_tests"])
def test_the_cache_is_chosen_before_the_hub_is_asked(name):
    """The Hub's client reads HF_HUB_CACHE when it is imported: the commands that set it may not have imported it."""
    code = f"import sys, benchmarks.{name}.__main__; print('huggingface_hub' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
