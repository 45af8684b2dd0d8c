"""`python -m titanlite.config`: check a configuration without starting anything, and print it as it was resolved.

Takes the arguments of a run, and `--print section.key` to print only that value. Set WORLD_SIZE to check the number of
ranks too. Exit code 1, and one line per problem, where the configuration is wrong.
"""

import sys
from dataclasses import asdict

from titanlite.config import ConfigError, dump_toml, load_config
from titanlite.config.schema import to_tables


def main(argv: list[str]) -> int:
    wanted = None
    if argv[:1] == ["--print"]:
        wanted, argv = argv[1], argv[2:]
    try:
        config = load_config(argv)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    if wanted is None:
        print(dump_toml(config), end="")
    else:
        table, _, key = wanted.rpartition(".")
        print(to_tables(asdict(config))[table][key])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
