"""Run the reference's own tests with minidiff's classes in place of its own, and count.

python -m benchmarks.reference_tests CHECKOUT                 # all files that concern what minidiff claims
python -m benchmarks.reference_tests CHECKOUT schedulers      # those whose path holds a word
python -m benchmarks.reference_tests CHECKOUT -k "unet and save" --show   # with the first cause of each failure

CHECKOUT is a checkout of the reference's repository (its ``tests`` folder is what counts). Each file runs twice: as it
is, and with the imports of the test modules migrated (``stand_in``). What fails or is skipped with the reference itself
is not counted; what tests a feature outside minidiff's scope is listed in ``excluded`` with the reason.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from benchmarks.reference_tests import fake_hub
from benchmarks.reference_tests.excluded import reason

ROOT = Path(__file__).parents[2]
FILES = (
    "schedulers/test_scheduler_ddim.py schedulers/test_scheduler_ddpm.py schedulers/test_scheduler_deis.py "
    "schedulers/test_scheduler_dpm_multi.py schedulers/test_scheduler_dpm_single.py "
    "schedulers/test_scheduler_edm_dpmsolver_multistep.py schedulers/test_scheduler_edm_euler.py "
    "schedulers/test_scheduler_euler.py "
    "schedulers/test_scheduler_euler_ancestral.py schedulers/test_scheduler_heun.py "
    "schedulers/test_scheduler_kdpm2_discrete.py schedulers/test_scheduler_kdpm2_ancestral.py "
    "schedulers/test_scheduler_lcm.py schedulers/test_scheduler_lms.py schedulers/test_scheduler_pndm.py "
    "schedulers/test_scheduler_tcd.py schedulers/test_scheduler_unipc.py schedulers/test_schedulers.py "
    "models/unets/test_models_unet_2d.py models/unets/test_models_unet_2d_condition.py "
    "models/autoencoders/test_models_autoencoder_kl.py models/autoencoders/test_models_autoencoder_tiny.py "
    "models/test_modeling_common.py models/test_models_auto.py "
    "others/test_config.py others/test_ema.py others/test_image_processor.py others/test_outputs.py "
    "others/test_training.py others/test_utils.py "
    "pipelines/ddim/test_ddim.py pipelines/ddpm/test_ddpm.py pipelines/test_pipelines.py "
    "pipelines/latent_consistency_models/test_latent_consistency_models.py "
    "pipelines/latent_consistency_models/test_latent_consistency_models_img2img.py "
    "pipelines/test_pipelines_auto.py pipelines/test_pipeline_utils.py "
    "pipelines/stable_diffusion/test_stable_diffusion.py pipelines/stable_diffusion/test_stable_diffusion_img2img.py "
    "pipelines/stable_diffusion/test_stable_diffusion_inpaint.py "
    "pipelines/stable_diffusion/test_stable_diffusion_instruction_pix2pix.py "
    "pipelines/stable_diffusion_2/test_stable_diffusion.py "
    "pipelines/stable_diffusion_2/test_stable_diffusion_inpaint.py "
    "pipelines/stable_diffusion_2/test_stable_diffusion_v_pred.py "
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py "
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_img2img.py "
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py "
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_instruction_pix2pix.py "
    "lora/test_lora_layers_sd.py lora/test_lora_layers_sdxl.py"
).split()


def run(checkout: Path, file: str, cache: Path, *, migrated: bool, select: str | None) -> dict[str, str]:
    """Run one file; return the outcome of each test: "passed", "skipped", or the last line of its error."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        cache = shutil.copytree(cache, Path(folder) / "hub")  # some tests move what they find there
        command = [
            sys.executable,
            "-m",
            "pytest",
            f"tests/{file}",
            "-q",
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
        ]
        command += ["--timeout=120", "-n0", "-o", "addopts=", "-W", "ignore"]
        command += ["-p", "benchmarks.reference_tests.stand_in"] if migrated else []
        command += ["-k", select] if select else []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"{file}: pytest left no report\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return dict(_outcome(case) for case in ElementTree.parse(report).iter("testcase"))


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
    for child in case:
        if child.tag == "skipped":
            return name, "skipped"
        if child.tag in ("failure", "error"):
            return name, (child.get("message") or "failed").strip().partition("\n")[0][:300]
    return name, "passed"


def main(arguments: list[str] | None = None) -> int:
    """Run and count; return 1 if a test that counts fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("words", nargs="*", help="only files whose path holds one of these")
    parser.add_argument("-k", dest="select", help="only tests that match, as for pytest")
    parser.add_argument("--show", action="store_true", help="print each failing test with its error")
    parser.add_argument("--baseline", type=Path, help="keep the outcomes with the reference itself in this JSON file")
    parser.add_argument("--json", type=Path, help="write the counts")
    options = parser.parse_args(arguments)
    known = json.loads(options.baseline.read_text()) if options.baseline and options.baseline.exists() else {}
    totals, causes, table = Counter(), Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        fake_hub.make(cache)
        for file in FILES:
            if options.words and not any(word in file for word in options.words):
                continue
            if file not in known or options.select:
                known[file] = run(options.checkout, file, cache, migrated=False, select=options.select)
                if options.baseline and not options.select:
                    options.baseline.write_text(json.dumps(known, indent=1))
            ours = run(options.checkout, file, cache, migrated=True, select=options.select)
            counts, excluded = Counter(), Counter()
            for name, outcome in known[file].items():
                if outcome != "passed":
                    continue
                found = ours.get(name, "not collected")
                if found == "passed":
                    counts["passed"] += 1
                elif why := reason(file, name):
                    counts["excluded"] += 1
                    excluded[why] += 1
                else:
                    counts["failing"] += 1
                    causes[found[:110]] += 1
                    if options.show:
                        print(f"    {name}: {found}")
            totals += counts
            table[file] = {**counts, "reasons": dict(excluded)}
            print(
                f"{file}: {counts['passed']} passed, {counts['excluded']} excluded, {counts['failing']} failing",
                flush=True,
            )
    print(f"in all: {totals['passed']} passed, {totals['excluded']} excluded, {totals['failing']} failing")
    for cause, count in causes.most_common(25):
        print(f"{count:4d}  {cause}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    return 1 if totals["failing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
