"""`python -m errata.bench.zoo {train,table,tokenizer,assets}`: makes and measures the micro zoo."""

import argparse
import json
import os
from pathlib import Path

# Threads that wait must sleep: on a busy machine spinning costs four times the time. Must be set
# before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _train(options: argparse.Namespace) -> None:
    import msgspec
    import torch
    from tokenizers import Tokenizer

    from errata.adapters.zoo.assets import TOKENIZER
    from errata.bench.zoo.release import ship
    from errata.bench.zoo.train import RECIPES, Recipe, Trainer

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    changed = {k: v for k, v in vars(options).items() if k in Recipe.__struct_fields__ and v}
    recipe = msgspec.structs.replace(RECIPES.get(options.family, Recipe()), **changed)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    trainer = Trainer(options.family, tokenizer, options.work, recipe)
    trainer.run()
    report = ship(trainer, options.target / options.family)
    print(json.dumps(report["exact_match"], indent=1))  # noqa: T201


def _tokenizer(options: argparse.Namespace) -> None:
    from errata.bench.data.world.world import World
    from errata.bench.zoo.tokenizer import train_tokenizer

    train_tokenizer(World()).save(str(options.target))


def _assets(options: argparse.Namespace) -> None:
    from errata.bench.zoo.assets import make_assets

    make_assets(options.pictures, options.target)


def _table(options: argparse.Namespace) -> None:
    from errata.bench.zoo.accuracy_table import update_readme

    update_readme(options.readme, options.weights)


def main() -> None:
    from errata.adapters.zoo.assets import FOLDER, TOKENIZER
    from errata.adapters.zoo.configs import MICRO

    parser = argparse.ArgumentParser(prog="python -m errata.bench.zoo", description=__doc__)
    subparsers = parser.add_subparsers(required=True)
    train = subparsers.add_parser("train", help="train a family and write its checkpoint")
    train.add_argument("family", choices=sorted(MICRO))
    train.add_argument("--work", type=Path, default=Path("out/zoo"), help="pictures, saved runs")
    train.add_argument("--target", type=Path, default=FOLDER / "weights")
    train.add_argument("--threads", type=int, default=1)
    train.add_argument("--vision-steps", type=int, dest="vision_steps")
    train.add_argument("--joint-steps", type=int, dest="joint_steps")
    train.set_defaults(run=_train)
    tokenizer = subparsers.add_parser("tokenizer", help="train the tokenizer anew")
    tokenizer.add_argument("--target", type=Path, default=TOKENIZER)
    tokenizer.set_defaults(run=_tokenizer)
    assets = subparsers.add_parser("assets", help="make the shipped digits and photographs anew")
    assets.add_argument("pictures", type=Path, help="scikit-image's folder of bundled images")
    assets.add_argument("--target", type=Path, default=FOLDER)
    assets.set_defaults(run=_assets)
    table = subparsers.add_parser("table", help="write the accuracies into the zoo's README")
    table.add_argument("--weights", type=Path, default=FOLDER / "weights")
    table.add_argument("--readme", type=Path, default=FOLDER / "README.md")
    table.set_defaults(run=_table)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
