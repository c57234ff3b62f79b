"""``python -m cogcache``."""

from cogcache.cli import main

if __name__ == "__main__":
    main()
