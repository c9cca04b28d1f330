"""Short programs, each in the style of a kind that people publish, run with the reference and with minidiff.

Each takes the library as an argument, in the place of the import line, and nothing else differs. The list of public
programs that these calls come from is docs/programs.md.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import minidiff
from tests.pictures import seeded
from tests.theirs import diffusers, relative_error, transformers
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

Program = Callable[[ModuleType, Path], list[Tensor]]
PROMPT = "two cats and a red heart"
STEPS = 3
UNET = {  # four levels, as published programs that name blocks expect them
    "block_out_channels": [16, 16, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 2,
    "sample_size": 32,  # 4x4 at the lowest level: below that, equal sums are rounded differently
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sd"), unet=UNET)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("xl"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compare bit for bit: more threads divide sums otherwise in attention written by hand."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transformers_of(library: ModuleType) -> ModuleType:
    return transformers if library is diffusers else minidiff


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def load(library: ModuleType, folder: Path, name: str = "StableDiffusionPipeline", **options: Any) -> Any:
    pipe = getattr(library, name).from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: Any = PROMPT, **options: Any) -> Tensor:
    options = {"num_inference_steps": STEPS, "generator": seeded(7), "output_type": "np"} | options
    return torch.from_numpy(np.asarray(pipe(prompt, **options).images))


def same(program: Program, folder: Path, bound: float = 0) -> None:
    """Run a program with both libraries: every tensor that it returns is the same, bit for bit where bound is 0."""
    theirs, ours = (program(library, folder) for library in (diffusers, minidiff))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) <= bound


def scripts_with_schedulers(library: ModuleType, folder: Path) -> list[Tensor]:
    """A web interface's generate function: a scheduler by its name, then one call. (Gradio, cog, InvokeAI)"""
    table = {
        "DDIM": (library.DDIMScheduler, {}),
        "euler a": (library.EulerAncestralDiscreteScheduler, {}),
        "heun karras": (library.HeunDiscreteScheduler, {"use_karras_sigmas": True}),
        "dpm++ 2m sde": (library.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        "unipc": (library.UniPCMultistepScheduler, {"cpu_only": True}),
        "lms": (library.LMSDiscreteScheduler, {}),
    }
    pipe = load(library, folder, safety_checker=None, requires_safety_checker=False).to("cpu")

    def generate(prompt: str, negative: str, steps: float, guidance: float, seed: str, sampler: str) -> Tensor:
        cls, extra = table[sampler]
        pipe.scheduler = cls.from_config({**pipe.scheduler.config, **extra})
        generator = torch.Generator("cpu").manual_seed(int(seed)) if seed else None
        options = {"negative_prompt": negative or None, "guidance_scale": float(guidance), "generator": generator}
        return draw(pipe, num_inference_steps=int(steps), **options)

    return [generate(PROMPT, "green hills", 4.0, 7, "5", sampler) for sampler in table]


def seamless_tiles(library: ModuleType, folder: Path) -> list[Tensor]:
    """Textures without seams: padding_mode, then InvokeAI's way of one axis only, and back again."""
    pipe = load(library, folder)
    plain = draw(pipe)
    convolutions = [m for net in (pipe.unet, pipe.vae) for m in net.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions:
        conv.padding_mode = "circular"
    both = draw(pipe)
    for conv in convolutions:
        conv.padding_mode = "zeros"

    def one_axis(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        x = F.pad(F.pad(x, (left, right, 0, 0), mode="circular"), (0, 0, top, bottom))
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    originals = [conv._conv_forward for conv in convolutions]
    for conv in convolutions:
        conv._conv_forward = one_axis.__get__(conv)
    axis = draw(pipe)
    for conv, original in zip(convolutions, originals, strict=True):
        conv._conv_forward = original
    return [plain, both, axis, draw(pipe)]


def inversion(library: ModuleType, folder: Path) -> list[Tensor]:
    """DDIM inversion with the loop written by hand, and the way back. (MasaCtrl, prompt-to-prompt, plug-and-play)"""
    pipe = load(library, folder)
    pipe.scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    tokens = pipe.tokenizer(
        [PROMPT],
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        text = pipe.text_encoder(tokens.input_ids.to(pipe.device))[0]
        x = pipe.vae.encode(noise(1, 3, 128, 128).clamp(-1, 1))["latent_dist"].mean * 0.18215
    alphas, history = scheduler.alphas_cumprod, [x]
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    for t in reversed(scheduler.timesteps):
        with torch.no_grad():
            eps = pipe.unet(x, t, encoder_hidden_states=text)["sample"]
        last = t - stride
        alpha = alphas[last] if last >= 0 else scheduler.final_alpha_cumprod
        x0 = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        x = alphas[t] ** 0.5 * x0 + (1 - alphas[t]) ** 0.5 * eps
        history.append(x)
    for t in pipe.progress_bar(scheduler.timesteps):
        with torch.no_grad():
            eps = pipe.unet(x, t, encoder_hidden_states=text).sample
        x = scheduler.step(eps, t, x, eta=0.0)["prev_sample"]
    with torch.no_grad():
        picture = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * x, return_dict=False)[0]
    return [*history, x, picture]


def panorama(library: ModuleType, folder: Path) -> list[Tensor]:
    """Overlapping windows denoised together, with the parts of a pipeline loaded one by one. (MultiDiffusion)"""
    texts = transformers_of(library)
    vae = library.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = library.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    tokenizer = texts.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = texts.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    scheduler = library.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    ids = tokenizer(["", PROMPT], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    x = noise(1, unet.config.in_channels, 32, 48)
    with torch.no_grad():
        text = encoder(ids.input_ids)[0]
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            total, count = torch.zeros_like(x), torch.zeros_like(x)
            for left in (0, 8, 16):
                view = x[..., left : left + 32]
                eps_empty, eps = unet(torch.cat([view] * 2), t, encoder_hidden_states=text)["sample"].chunk(2)
                eps = eps_empty + 7.5 * (eps - eps_empty)
                total[..., left : left + 32] += scheduler.step(eps, t, view)["prev_sample"]
                count[..., left : left + 32] += 1
            x = total / count
        return [x, vae.decode(1 / 0.18215 * x).sample]


def weighted_words(library: ModuleType, folder: Path) -> list[Tensor]:
    """Prompts of several windows with weights, put together outside the pipeline. (compel, sd_embed, lpw)"""
    pipe = load(library, folder)
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    ids = tokenizer("a smiling face " * 40, truncation=False, padding=False)["input_ids"][1:-1]
    windows = [ids[i : i + 75] for i in range(0, len(ids), 75)]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [[bos, *window, *[eos] * (76 - len(window))] for window in windows]
    device, dtype = encoder.device, encoder.dtype
    with torch.no_grad():
        output = encoder(torch.tensor(rows, device=device), output_hidden_states=True, return_dict=True)
    text = output.hidden_states[-1].to(dtype=dtype)
    mean = text.mean(dim=[-2, -1], keepdim=True)
    text[:, 5:9] *= 1.4
    text = (text * mean / text.mean(dim=[-2, -1], keepdim=True)).reshape(1, -1, text.shape[-1])
    return [text, draw(pipe, None, prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text))]


def wrapped_network(library: ModuleType, folder: Path) -> list[Tensor]:
    """unet.forward replaced by a function that sometimes answers with what it answered last. (DeepCache, T-GATE)"""
    pipe = load(library, folder)
    original, kept, calls = pipe.unet.forward, [], []

    def forward(sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(float(timestep))
        if len(calls) % 2 == 1:
            kept[:] = [original(sample, timestep, *args, **kwargs)]
        return kept[0]

    pipe.unet.forward = forward
    skipped = draw(pipe, num_inference_steps=5)
    pipe.unet.forward = original
    return [skipped, torch.tensor(calls), draw(pipe)]


def previews(library: ModuleType, folder: Path) -> list[Tensor]:
    """A preview at every step, guidance that ends early, and a stop. (the callback pages, web interfaces)"""
    pipe = load(library, folder)
    seen = []
    rgb = noise(4, 3, seed=3)

    def on_step(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        preview = torch.einsum("bchw,cr->bhwr", tensors["latents"], rgb).clamp(0, 1)
        seen.append(torch.from_numpy(np.array(Image.fromarray((preview[0] * 255).byte().numpy()))))
        if step == int(pipe.num_timesteps * 0.4):
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step == 1
        return tensors

    inputs = ["latents", "prompt_embeds"]
    cut = draw(pipe, num_inference_steps=5, callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=inputs)
    return [cut, *seen, draw(pipe, num_inference_steps=5, callback_on_step_end=stop)]


def training(library: ModuleType, folder: Path) -> list[Tensor]:
    """The steps of train_text_to_image.py: frozen VAE and text encoder, noise, velocity or noise as target, AdamW."""
    texts = transformers_of(library)
    noiser = library.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizer = texts.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = texts.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    vae = library.AutoencoderKL.from_pretrained(folder, subfolder="vae", revision=None, variant=None)
    unet = library.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", revision=None)
    vae.requires_grad_(False)
    encoder.requires_grad_(False)
    unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2, weight_decay=1e-2)
    generator, losses = seeded(4), []
    for kind in ("epsilon", "v_prediction"):
        ids = tokenizer([PROMPT, "blue sky"], max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        x = vae.encode(noise(2, 3, 128, 128).clamp(-1, 1)).latent_dist.sample(generator) * vae.config.scaling_factor
        eps = torch.randn(x.shape, generator=generator)
        t = torch.randint(0, noiser.config.num_train_timesteps, (2,), generator=generator).long()
        noiser.register_to_config(prediction_type=kind)
        target = eps if noiser.config.prediction_type == "epsilon" else noiser.get_velocity(x, eps, t)
        text = encoder(ids.input_ids, return_dict=False)[0]
        out = unet(noiser.add_noise(x, eps, t), t, text, return_dict=False)[0]
        loss = F.mse_loss(out.float(), target.float())
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    pipe = load(library, folder, unet=unet.eval(), text_encoder=encoder, vae=vae)
    return [*losses, draw(pipe)]


def base_and_refiner(library: ModuleType, folder: Path) -> list[Tensor]:
    """The script that everybody has for SDXL: size conditions, latents handed on to the image-to-image pipeline."""
    base = load(library, folder, "DiffusionPipeline", use_safetensors=True)
    refiner = library.StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "generator": seeded(1)}
    latents = base(PROMPT, denoising_end=0.6, output_type="latent", original_size=(64, 48), **options).images
    return [latents, draw(refiner, image=latents, denoising_start=0.6, num_inference_steps=5)]


def merged_tokens(library: ModuleType, folder: Path) -> list[Tensor]:
    """Transformer blocks found by the name of their class and given another class, and back. (ToMe for SD)"""
    pipe = load(library, folder)
    plain = draw(pipe)
    blocks = [m for _, m in pipe.unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    for block in blocks:

        class Merged(type(block)):
            _parent = type(block)

            def forward(self, hidden_states: Tensor, attention_mask: None = None, **text: Any) -> Tensor:
                pairs = self.norm1(hidden_states).unflatten(1, (-1, 2)).mean(2)
                x = hidden_states + self.attn1(pairs, encoder_hidden_states=None).repeat_interleave(2, 1)
                x = x + self.attn2(self.norm2(x), encoder_hidden_states=text["encoder_hidden_states"])
                return x + self.ff(self.norm3(x))

        block.__class__ = Merged
    merged = draw(pipe)
    assert relative_error(merged, plain) > 1e-3
    for block in blocks:
        block.__class__ = block._parent
    return [torch.tensor(len(blocks) + 0.0), merged, draw(pipe)]


def stored_attention(library: ModuleType, folder: Path) -> list[Tensor]:
    """A processor that keeps the maps of each attention, set by name. (prompt-to-prompt, Attend-and-Excite)"""
    pipe = load(library, folder)
    maps: dict[str, Tensor] = {}

    class Store:
        def __init__(self, place: str) -> None:
            self.place = place

        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
            batch, length, _ = hidden_states.shape
            mask = attn.prepare_attention_mask(None, length, batch)
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (
                attn.head_to_batch_dim(f(x))
                for f, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
            )
            probabilities = attn.get_attention_scores(q, k, mask)
            maps[self.place] = maps.get(self.place, 0) + probabilities
            return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, v))))

    pipe.unet.set_attn_processor({name: Store(name) for name in pipe.unet.attn_processors})
    picture = draw(pipe, num_inference_steps=2)
    chosen = [name for name in sorted(maps) if "attn2" in name and not name.startswith("mid")]
    return [picture, *(maps[name] for name in chosen)]


def backbone_and_skips(library: ModuleType, folder: Path) -> list[Tensor]:
    """The forward of the blocks on the way up replaced, which scales what they get. (FreeU, DeepCache)"""
    pipe = load(library, folder)
    plain = draw(pipe)
    originals = []
    for i, block in enumerate(pipe.unet.up_blocks):
        for j, layer in enumerate(block.resnets):

            def forward(x: Tensor, temb: Tensor, *rest: Any, original: Any = layer.forward, k: int = i + j) -> Tensor:
                half = x.shape[1] // 2
                return original(torch.cat([x[:, :half] * (1 + 0.1 * k), x[:, half:]], dim=1), temb, *rest)

            originals.append((layer, layer.forward))
            layer.forward = forward
    changed = draw(pipe)
    for layer, original in originals:
        layer.forward = original
    assert relative_error(changed, plain) > 1e-3
    assert pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_q").in_features == 16
    return [changed, draw(pipe)]


def community_pipeline(library: ModuleType, folder: Path) -> list[Tensor]:
    """A pipeline of one's own with parts of a published checkpoint. (diffusers/examples/community)"""

    class Walk(library.DiffusionPipeline):
        def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
            super().__init__()
            parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
            self.register_modules(**parts, unet=unet, scheduler=scheduler)
            self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

        @torch.no_grad()
        def __call__(self, prompts: list[str], steps: int) -> Tensor:
            inputs = self.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
            a, b = self.text_encoder(inputs.input_ids.to(self.device))[0]
            text = torch.stack([torch.lerp(a, b, w) for w in (0.0, 0.3, 1.0)])
            shape = (1, self.unet.config.in_channels, 32, 32)
            x = torch.randn(shape, generator=seeded(), dtype=self.unet.dtype).repeat(3, 1, 1, 1)
            self.scheduler.set_timesteps(steps, device=self.device)
            x = x * self.scheduler.init_noise_sigma
            for t in self.progress_bar(self.scheduler.timesteps):
                eps = self.unet(self.scheduler.scale_model_input(x, t), t, encoder_hidden_states=text).sample
                x = self.scheduler.step(eps, t, x).prev_sample
            return self.vae.decode(x / self.vae.config.scaling_factor).sample

    scheduler = library.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe = Walk.from_pretrained(folder, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return [pipe(["a red heart", "two cats"], STEPS)]


def streamed_consistency(library: ModuleType, folder: Path) -> list[Tensor]:
    """Steps of consistency sampling in one batch, by their formula. (StreamDiffusion)"""
    pipe = load(library, folder)
    other = library.StableDiffusionImg2ImgPipeline(**pipe.components, **pipe.parameters)
    scheduler = library.LCMScheduler.from_config(other.scheduler.config)
    scheduler.set_timesteps(50)
    x, times = noise(3, 4, 32, 32), scheduler.timesteps[[30, 40, 49]]
    scalings = [scheduler.get_scalings_for_boundary_condition_discrete(t) for t in times]
    c_skip, c_out = (torch.stack(column).view(-1, 1, 1, 1) for column in zip(*scalings, strict=True))
    alpha_bar = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].repeat(3, 1, 1)
    with torch.no_grad():
        out = other.unet(x, times, encoder_hidden_states=text, return_dict=False)[0]
    return [c_out * (x - (1 - alpha_bar).sqrt() * out) / alpha_bar.sqrt() + c_skip * x]


def widened_input(library: ModuleType, folder: Path) -> list[Tensor]:
    """A UNet that is to read an image too: its first layer exchanged. (train_instruct_pix2pix.py)"""
    unet = library.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    wide = nn.Conv2d(8, unet.conv_in.out_channels, unet.conv_in.kernel_size, unet.conv_in.stride, unet.conv_in.padding)
    unet.register_to_config(in_channels=8)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, :4, :, :].copy_(unet.conv_in.weight)
        wide.bias.copy_(unet.conv_in.bias)
        unet.conv_in = wide
        return [unet(noise(1, 8, 32, 32), 500, noise(1, 77, 24, seed=1)).sample]


@pytest.mark.parametrize(
    "program",
    [
        scripts_with_schedulers,
        seamless_tiles,
        inversion,
        panorama,
        weighted_words,
        wrapped_network,
        previews,
        merged_tokens,
        stored_attention,
        backbone_and_skips,
        community_pipeline,
        streamed_consistency,
        widened_input,
    ],
    ids=lambda program: program.__name__,
)
def test_programs(program: Program, sd: Path) -> None:
    same(program, sd)


def masked_text(library: ModuleType, folder: Path) -> list[Tensor]:
    """A block whose forward is replaced by one that hands on whatever it got, in a run with a mask over the text."""
    unet = library.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    mask, x, text = torch.arange(77)[None] < 9, noise(1, 4, 32, 32), noise(1, 77, 24, seed=1)
    block = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    plain, seen = block.forward, []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["encoder_attention_mask"] is not None)
        return plain(*args, **kwargs)

    block.forward = forward
    with torch.no_grad():
        masked = unet(x, 500, text, encoder_attention_mask=mask).sample
        changed = unet(x, 500, torch.where(mask[..., None], text, 7.0), encoder_attention_mask=mask).sample
    assert seen == [True, True]
    assert torch.equal(masked, changed)
    return [masked]


def test_masks_reach_what_takes_the_place_of_a_block(sd: Path) -> None:
    same(masked_text, sd)


def test_training(sd: Path) -> None:
    same(training, sd, bound=1e-5)  # measured 2.5e-6: gradients add up in another order


def test_programs_of_sdxl(xl: Path) -> None:
    same(base_and_refiner, xl)
