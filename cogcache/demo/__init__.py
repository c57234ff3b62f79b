"""The whole product on eight real clips: encode, train, infer, and a picture of what came out.

Only the command line imports this package, since it uses all three stages.
"""

from cogcache.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
