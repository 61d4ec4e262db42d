"""What the state API raises."""


class RayStateApiException(Exception):
    """A question to the cluster's state that could not be answered."""


class ServerUnavailable(RayStateApiException):
    """The cluster did not answer."""


class DataSourceUnavailable(RayStateApiException):
    """A part of the cluster that knows the answer could not be asked."""
