from types import SimpleNamespace

import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.hooks import LockHook


@pytest.mark.parametrize("end", ["after_pipeline_run", "on_pipeline_error"])
def test_lock_is_free_again_after_the_run_however_it_ends(tmp_path, end):
    first, second = LockHook(), LockHook()
    for hook in (first, second):
        hook.after_context_created(SimpleNamespace(project_path=tmp_path))
    first.before_pipeline_run()
    with pytest.raises(UserError, match=r"Another run is writing into .*data \(process \d+, since 20"):
        second.before_pipeline_run()
    getattr(first, end)()
    second.before_pipeline_run()
    getattr(second, end)()
