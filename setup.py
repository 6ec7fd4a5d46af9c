from setuptools import setup

# Two trees, one package: modeling/ is also what a drafter's Hub repository holds as remote code.
setup(
    packages=[
        "hf_d2sd",
        "hf_d2sd.apps",
        "hf_d2sd.benchmark",
        "hf_d2sd.hub",
        "hf_d2sd.modeling",
        "hf_d2sd.training",
    ],
    package_dir={"hf_d2sd": "src/hf_d2sd", "hf_d2sd.modeling": "modeling"},
)
