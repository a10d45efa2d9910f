"""Sample images from the EMA weights of a checkpoint (of a run folder: its newest), or of a snapshot in RUN/ema.

python launch/sample.py --checkpoint runs/demo --prompt "a red apple on a teal background" --output apple.png
"""

from pathlib import Path

from launch.common import add_overwrite, command, inference, keep_files, run


def main() -> int:
    parser = command(__doc__, config=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, a snapshot or a run folder")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--output", type=Path, required=True, help="PNG file; several images make a grid")
    parser.add_argument("--count", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; equal seeds give equal images (default: 0)")
    add_overwrite(parser)
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error("--count must be at least 1")
    if arguments.output.suffix != ".png":
        parser.error(f"--output must end in .png, got {arguments.output}")
    keep_files(arguments.overwrite, arguments.output)
    from trainer.evaluate.generate import save_grid
    from trainer.parallel.mesh import rank

    with inference(arguments.checkpoint, arguments.overrides) as (opened, model):
        prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.count)]
        images = model.images(prompts, arguments.seed)
        if rank() == 0:
            save_grid(images, arguments.output)
            print(f"{len(images)} images from the EMA weights of {opened.folder}: {arguments.output}")
    return 0


if __name__ == "__main__":
    run(main)
