"""The delay network against SciPy, its definition and what its state must say about the past."""

import inspect
import math

import pytest
import torch
from scipy.signal import cont2discrete

import bounds
from legato.legendre import delay_network, window_decoder

DISCRETIZERS = ["zoh", "euler", "bilinear"]
# What a caller without the shape checker meets.
unchecked_delay_network = inspect.unwrap(delay_network)
unchecked_window_decoder = inspect.unwrap(window_decoder)


def continuous(order, theta):
    """The paper's A and B, element by element."""
    A = torch.empty(order, order, dtype=torch.float64)
    B = torch.empty(order, dtype=torch.float64)
    for i in range(order):
        B[i] = (2 * i + 1) * (-1) ** i / theta
        for j in range(order):
            A[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    return A, B


def scipy_step(order, theta, method):
    A, B = continuous(order, theta)
    system = (A.numpy(), B.numpy()[:, None], torch.eye(order).numpy(), torch.zeros(order, 1).numpy())
    A, B, *_ = cont2discrete(system, dt=1.0, method=method)
    return torch.from_numpy(A), torch.from_numpy(B)[:, 0]


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("discretizer", DISCRETIZERS)
@pytest.mark.parametrize(("order", "theta"), [(1, 30.0), (2, 4.0), (6, 100.0), (40, 1234.5)])
def test_it_agrees_with_scipy(discretizer, order, theta):
    A, B = delay_network(order, theta, discretizer=discretizer)
    expected_A, expected_B = scipy_step(order, theta, discretizer)
    assert A.dtype == B.dtype == torch.float64
    assert relative(A, expected_A) <= 1e-12
    assert relative(B, expected_B) <= 1e-12


@pytest.mark.parametrize(("order", "theta"), [(256, 784), (468, 784), (64, 1)])
def test_zoh_agrees_with_scipy_at_large_orders_and_short_windows(order, theta):
    A, B = delay_network(order, theta)
    expected_A, expected_B = scipy_step(order, theta, "zoh")
    assert relative(A, expected_A) <= 1e-12
    assert relative(B, expected_B) <= 1e-12


@pytest.mark.parametrize("discretizer", DISCRETIZERS)
def test_several_windows_are_the_single_ones_stacked(discretizer):
    thetas = [20.0, 100.0, 555.5]
    A, B = delay_network(5, torch.tensor(thetas, dtype=torch.float64), discretizer=discretizer)
    singles = [delay_network(5, theta, discretizer=discretizer) for theta in thetas]
    expected = tuple(torch.stack(x) for x in zip(*singles, strict=True))
    assert_agrees((A, B), expected, thetas, discretizer)


def assert_agrees(found, expected, thetas, discretizer="zoh"):
    """Solves and exponentials of the order N in two ways: sums of N terms, N of them in turn."""
    order = found[0].shape[-1]
    thetas = torch.as_tensor(thetas, dtype=torch.float64)
    magnitude = bounds.sensitivity(lambda theta: delay_network(order, theta, discretizer=discretizer), thetas)
    counts = [2 * bounds.likely(x.numel(), terms=order**2) for x in found]
    bounds.assert_close(found, expected, magnitude=magnitude, roundings=counts)


def test_a_theta_tensor_of_no_axis_and_a_number_are_the_same():
    A, B = delay_network(4, torch.tensor(50.0))
    expected_A, expected_B = delay_network(4, 50)
    assert torch.equal(A, expected_A)
    assert torch.equal(B, expected_B)


@pytest.mark.parametrize("discretizer", DISCRETIZERS)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_gradients_of_theta_are_the_numerical_ones(discretizer, shape):
    theta = (20 + 10 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    torch.autograd.gradcheck(
        lambda theta: delay_network(4, theta, discretizer=discretizer), theta, check_forward_ad=True
    )
    torch.autograd.gradgradcheck(lambda theta: delay_network(4, theta, discretizer=discretizer), theta)


def test_a_map_over_theta_is_the_stacked_one():
    theta = torch.tensor([30.0, 70.0], dtype=torch.float64)
    found = torch.func.vmap(lambda theta: delay_network(3, theta))(theta)
    assert_agrees(found, delay_network(3, theta), theta)


@pytest.mark.parametrize("order", [1, 2, 12, 100])
def test_the_zoh_memory_never_grows(order):
    A, _ = delay_network(order, theta=max(1.0, order / 4))
    assert torch.linalg.eigvals(A).abs().max() < 1


def test_euler_is_refused_exactly_where_it_would_grow():
    order = 6
    z = torch.linalg.eigvals(continuous(order, 1.0)[0])
    least = float((z.abs() ** 2 / (-2 * z.real)).max())
    A, _ = delay_network(order, least * 1.001, discretizer="euler")
    assert torch.linalg.eigvals(A).abs().max() <= 1
    with pytest.raises(ValueError, match='discretizer="zoh"'):
        delay_network(order, least * 0.999, discretizer="euler")
    assert torch.linalg.eigvals(continuous(order, least * 0.999)[0] + torch.eye(order)).abs().max() > 1


def test_the_decoder_holds_the_legendre_polynomials():
    decoder = window_decoder(5, 11)
    x = 2 * torch.linspace(0, 1, 11, dtype=torch.float64) - 1
    for i in range(5):
        # By a recurrence of 4 roundings an order, of numbers of at most 3; a rounding of x moves P_i by i (i + 1) / 2.
        exact = torch.special.legendre_polynomial_p(x, i)
        bounds.assert_close(decoder[:, i], exact, magnitude=3, roundings=2 * (4 * i + i * (i + 1) / 2))


@pytest.mark.parametrize(("order", "points"), [(1, 1), (1, 5), (2, 3), (64, 1)])
def test_the_decoder_has_points_rows_and_order_columns(order, points):
    assert window_decoder(order, points).shape == (points, order)
    # r = 0 is now: P_i(-1) = (-1)^i.
    assert torch.equal(window_decoder(order, points)[0], (-1.0) ** torch.arange(order, dtype=torch.float64))


def test_the_memory_of_a_slow_sine_decodes_to_its_window():
    order, theta, points = 12, 200, 41
    t = torch.arange(3 * theta, dtype=torch.float64)
    u = torch.sin(2 * math.pi * t / theta)
    A, B = delay_network(order, theta)
    m = torch.zeros(order, dtype=torch.float64)
    for u_t in u:
        m = A @ m + B * u_t
    seen = window_decoder(order, points) @ m
    ago = torch.linspace(0, 1, points, dtype=torch.float64) * theta
    # A held input lags by half a step, and its steps hold what the order cannot: half a step of the steepest slope.
    wanted = torch.sin(2 * math.pi * (t[-1] + 0.5 - ago) / theta)
    half_a_step = math.pi / theta
    assert (seen - wanted).abs().max() <= half_a_step


@pytest.mark.parametrize("order", [0, -1, 2.0, True, "6", None])
def test_an_order_that_is_no_count_is_refused(order):
    error = ValueError if order in (0, -1) else TypeError
    for build in (unchecked_delay_network, unchecked_window_decoder):
        with pytest.raises(error, match="expected order to be an int of at least 1"):
            build(order, 10)


def test_a_decoder_of_no_points_is_refused():
    with pytest.raises(ValueError, match="expected points to be an int of at least 1, got 0"):
        window_decoder(3, 0)


@pytest.mark.parametrize("make", [float, torch.tensor, lambda theta: torch.tensor([50.0, theta])])
@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (0.0, "theta must be 1 step or more, got 0.0"),
        (-3.0, "theta must be 1 step or more, got -3.0"),
        (0.5, "not in seconds"),
        (math.nan, "theta must be finite, got nan"),
        (math.inf, "theta must be finite, got"),
    ],
)
def test_a_theta_that_would_give_nan_is_refused(make, theta, message):
    with pytest.raises(ValueError, match=message):
        delay_network(4, make(theta))


@pytest.mark.parametrize("theta", [torch.ones(2, 2), torch.tensor(5), "100", None, True])
def test_a_theta_of_another_kind_is_refused(theta):
    with pytest.raises(ValueError, match="theta must be a number or a float tensor"):
        unchecked_delay_network(4, theta)


def test_an_unknown_discretizer_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'bilinear'"):
        delay_network(4, 10, discretizer="bilinaer")


@pytest.mark.compiled
@pytest.mark.parametrize("discretizer", DISCRETIZERS)
def test_a_trained_theta_compiles_into_one_graph(discretizer):
    theta = torch.tensor([30.0, 70.0], dtype=torch.float64, requires_grad=True)

    def total(theta):
        A, B = delay_network(4, theta, discretizer=discretizer)
        return (A.square().sum() + B.sum()) * 2

    (got,) = torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(theta), theta)
    # Sums over 16 entries, before them of order 4 in solves and exponentials.
    bounds.assert_agrees(got, lambda theta: torch.autograd.grad(total(theta), theta)[0], theta, terms=16 * 16)
