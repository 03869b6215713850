"""Studies by name. A new one is a module here with a `STUDY`."""

from o1jax.studies import behaviors, guidance, learning, legal_play, search
from o1jax.studies.study import Study

STUDIES: dict[str, Study] = {
  study.name: study
  for study in (
    search.STUDY,
    guidance.STUDY,
    legal_play.STUDY,
    learning.STUDY,
    behaviors.STUDY,
  )
}
