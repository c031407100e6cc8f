"""`python -m diffclass`: the command, as `accelerate launch -m diffclass ...` starts it on several devices."""

from diffclass.cli import main

if __name__ == "__main__":
    main()
