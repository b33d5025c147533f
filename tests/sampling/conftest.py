from tests.model.conftest import build, nano  # noqa: F401
