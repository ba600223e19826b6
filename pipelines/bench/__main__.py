"""`python -m accel.pipelines.bench`: the command without its script."""

from accel.pipelines.bench import main

if __name__ == "__main__":
    main()
