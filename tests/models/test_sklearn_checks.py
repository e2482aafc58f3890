"""scikit-learn's own battery, over bases of several kinds: every check passes, and none is expected to fail."""

from typing import Any

import pytest
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsRegressor
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

import residual_memory as rm

BASES: list[Any] = [
    rm.ResMemClassifier(LogisticRegression()),
    rm.ResMemClassifier(GaussianNB()),
    rm.ResMemClassifier(RandomForestClassifier(5, random_state=0)),
    rm.ResMemRegressor(LinearRegression()),
    rm.ResMemRegressor(DecisionTreeRegressor(random_state=0)),
    rm.ResMemRegressor(RandomForestRegressor(5, random_state=0)),
    rm.ResMemRegressor(KNeighborsRegressor(2)),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings(
    "ignore:divide by zero encountered in log:RuntimeWarning"
)  # naive Bayes, a class of weight 0
@parametrize_with_checks(BASES)  # type: ignore[untyped-decorator]
def test_every_check_of_scikit_learn_passes(estimator: Any, check: Any) -> None:
    check(estimator)
