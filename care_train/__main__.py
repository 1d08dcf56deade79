"""`care-train`, and `python -m care_train` for launchers that start modules."""

import sys


def main() -> int:
    """Run the command line; without the trainer's packages, say in one line what to install."""
    try:
        from care_train import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("care_train", "care_kernels"):
            raise
        print(
            f"care-train: error: {package} is not installed; wanted the trainer's packages: "
            "pip install 'care-rl[train]'",
            file=sys.stderr,
        )
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
