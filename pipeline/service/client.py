"""The commands that talk to a server: submit, jobs, logs, cancel and retry."""

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import click
import httpx

from pipeline import UserError
from pipeline.cli import Command, json_text, printable
from pipeline.service.progress import describe

if TYPE_CHECKING:
    from pipeline.service.kinds import Kind

URL, TOKEN = "PENSTOCK_URL", "PENSTOCK_TOKEN"
DEFAULT = "http://127.0.0.1:8080"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TIMEOUT = 30.0  # s that an answer may take
PAUSE = 0.5  # s between two looks at a job, and before a lost request is sent again
PATIENCE = 120.0  # s without an answer until who follows a job gives up
OVER = ("succeeded", "failed", "cancelled")  # as database.py has them, which takes long to import
ARGUMENTS = ("raw", "dataset", "run")  # the parameters of a job that have no --, in the order of the command line
Job: TypeAlias = dict[str, Any]  # as the server has it in JSON


class Unreachable(UserError):
    """A server that does not answer now, but may soon."""


class Server:
    """A server by its URL, with a token of it. Redirections are not followed: the token is for this host alone."""

    def __init__(self, url: str, token: str) -> None:
        """Raise UserError where the URL or the token cannot be one; nothing is sent yet."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UserError(f"{URL} {url}: no URL ({error}); such as {DEFAULT}") from error
        if parsed.userinfo:
            raise UserError(f"{URL}: has a user name or a password; leave it out, and put a token into {TOKEN}")
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise UserError(f"{URL} {url}: not the address of a server, such as {DEFAULT}")
        if not re.fullmatch(r"[!-~]{0,4096}", token):
            raise UserError(f"{TOKEN}: holds characters that no token has; copy it again, without spaces")
        self.url = url.rstrip("/")
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        # a proxy of the environment is for other machines
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=parsed.host not in LOOPBACK
        )

    def json(self, method: str, path: str, key: str, again: bool = False, **options: Any) -> Any:
        """Return the JSON object of an answer, which has `key`. `again`: send a request that was lost once more.

        Raises Unreachable; UserError: the server refuses, or is no Penstock.
        """
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            if again and not isinstance(error, httpx.ConnectError):
                time.sleep(PAUSE)
                return self.json(method, path, key, **options)
            raise self._lost(error) from error
        self._check(response)
        try:
            value = response.json()
        except ValueError:  # HTML, say
            value = None
        if not isinstance(value, dict) or key not in value:
            self._foreign(response)
        return value

    def log(self, number: int, offset: int) -> Iterator[bytes]:
        """Yield the log of a job from a byte on, in parts as they come. Raises Unreachable, UserError."""
        try:
            path, headers = f"/v1/jobs/{number}/log", {"Range": f"bytes={offset}-"}
            with self._http.stream("GET", path, headers=headers) as response:
                if response.status_code == 416:  # nothing is there beyond `offset`
                    return
                if not response.is_success:
                    response.read()
                self._check(response)
                if offset and response.status_code != 206:
                    raise UserError(f"{self.url}: answers a range of the log with all of it; ask without a proxy")
                yield from response.iter_raw()
        except httpx.TransportError as error:
            raise self._lost(error) from error

    def _check(self, response: httpx.Response) -> None:
        """Raise UserError for an answer that is a refusal, with the server's own words."""
        if response.is_success:
            return
        if response.is_redirect:
            there = response.headers["location"]
            raise UserError(f"{self.url}: sends us to {there}; where that is right, change {URL}")
        try:
            problem = response.json()
        except ValueError:
            problem = None
        detail = problem.get("detail") if isinstance(problem, dict) else None
        if response.status_code in (429, 502, 503, 504):
            raise Unreachable(f"{self.url}: {detail or response.reason_phrase}")
        if not isinstance(detail, str):
            self._foreign(response)
        raise UserError(detail + (f"; put one into {TOKEN}" if response.status_code in (401, 403) else ""))

    def _foreign(self, response: httpx.Response) -> NoReturn:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        raise UserError(f"{self.url}: {status}, but not as `penstock serve` answers; check {URL}")

    def _lost(self, error: httpx.TransportError) -> Unreachable:
        reason = re.sub(r"^\[.*?\] *", "", str(error)) or type(error).__name__
        return Unreachable(f"{self.url}: {reason}; run `penstock serve` there, or name another server in {URL}")


def server() -> Server:
    """Return the server that the environment names."""
    return Server(os.environ.get(URL) or DEFAULT, os.environ.get(TOKEN, "").strip())


def follow(source: Server, number: int, show: Callable[[bytes], None], to_end: bool = True) -> Job:
    """Show each line of a job's log once, as it is written, and return the job when it is over.

    A lost connection is made anew, and the log goes on at the byte where it broke off. With `to_end` false only what is
    there is shown. Raises UserError: the server refuses, or has been away for PATIENCE seconds.
    """
    offset, rest, answered = 0, b"", time.monotonic()
    while True:
        try:
            job: Job = source.json("GET", f"/v1/jobs/{number}", "state")  # first: once it is over, its log is whole
            for part in source.log(number, offset):
                offset += len(part)
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    show(line)
        except Unreachable as error:
            if not to_end or time.monotonic() - answered > PATIENCE:
                error.add_note(f"the job may go on: penstock logs -f {number}")
                raise
        else:
            answered = time.monotonic()
            if job["state"] in OVER or not to_end:
                if rest:
                    show(rest)
                return job
        time.sleep(PAUSE)


def finish(job: Job) -> None:
    """Raise UserError, with the exit code of its command, for a job that did not succeed."""
    if job["state"] == "succeeded":
        return
    code = job["exit_code"]
    error = UserError(f"job {job['id']} {job['state']}" + (f": {job['reason']}" if job["reason"] else ""))
    error.exit_code = code if code and 0 < code < 256 else 1
    raise error


def shower(as_json: bool) -> Callable[[bytes], None]:
    """Return a function that prints a line of a log: as it is, or what its JSON says as a sentence."""
    return lambda line: click.echo(printable(line.decode(errors="replace")) if as_json else describe(line))


def report(source: Server, job: Job, wait: bool, as_json: bool) -> None:
    """Print a job that was made, and with `wait` its log until it ends as its command did."""
    if as_json:
        click.echo(json_text(job))
    else:
        more = "" if wait else f"; penstock logs -f {job['id']} follows it"
        click.echo(
            printable(f"job {job['id']}, {job['kind']} {job['target'] or '(every data set)'}: {job['state']}{more}")
        )
    if wait:
        finish(follow(source, job["id"], shower(as_json)))


NUMBER = click.Argument(["number"], type=click.IntRange(1), metavar="ID")
AS_JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON, an object a line.")
WAIT = click.Option(["--wait"], is_flag=True, help="Print the log until the job ends, and end with its exit code.")
GOES_ON = "the job goes on; penstock logs -f ID follows it, penstock cancel ID ends it"


class Submit(click.Group):
    """The kinds of jobs as commands, whose options are the kinds' parameters."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from pipeline.service.kinds import KINDS

        return list(KINDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from pipeline.service.kinds import KINDS

        return kind_command(cmd_name, KINDS[cmd_name]) if cmd_name in KINDS else None


@click.command(cls=Submit)
def submit() -> None:
    """Submit a job to the server at PENSTOCK_URL (default: http://127.0.0.1:8080).

    \b
    Examples:
      penstock submit build /srv/imagenet imagenet-256
      penstock submit train imagenet-256 first --recipe tiny --set train.steps=4 --wait
    """


def kind_command(name: str, kind: "type[Kind]") -> click.Command:
    """Return the command that submits a job of a kind."""
    schema = kind.model_json_schema()
    needed = sorted({*schema["required"]} - {"kind"}, key=ARGUMENTS.index)
    options = [_option(field, spec) for field, spec in schema["properties"].items() if field not in ("kind", *needed)]

    def run(wait: bool, as_json: bool, **values: Any) -> None:
        body = {"kind": name} | {field: v for field, v in values.items() if v or type(v) in (int, float)}
        for path in kind.paths:  # below this folder, where the server is on this machine
            if path in body and "://" not in body[path]:
                body[path] = os.path.abspath(body[path])
        source, headers = server(), {"Idempotency-Key": uuid.uuid4().hex}
        report(source, source.json("POST", "/v1/jobs", "id", again=True, json=body, headers=headers), wait, as_json)

    params = [*(click.Argument([field]) for field in needed), *options, WAIT, AS_JSON]
    return Command(name, callback=run, params=params, help=kind.__doc__, interrupted=GOES_ON)


def _option(name: str, spec: dict[str, Any]) -> click.Option:
    """Return the option for a parameter, by its JSON schema."""
    spec = next((spec | branch for branch in spec.get("anyOf", ()) if branch.get("type") != "null"), spec)
    bounds = spec.get("minimum"), spec.get("maximum")
    forms: dict[str, dict[str, Any]] = {
        "boolean": {"is_flag": True},
        "integer": {"type": click.IntRange(*bounds)},
        "number": {"type": click.FloatRange(*bounds)},
        "array": {"metavar": "VALUE,…", "callback": lambda _, option, text: text and text.split(",")},
        "object": {"metavar": "KEY=VALUE", "multiple": True, "callback": _pairs},
    }
    form = {"type": click.Choice(spec["enum"])} if "enum" in spec else forms.get(spec["type"], {})
    default = f"[default: {spec['default']}]" if spec.get("default") else ""
    text = " ".join(filter(None, [spec.get("description"), default]))
    return click.Option([f"--{name.replace('_', '-')}", name], help=text, **form)


def _pairs(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise click.BadParameter(f"{text}: has no value; write KEY=VALUE")
    return dict(text.split("=", 1) for text in texts)


@click.command(cls=Command, params=[AS_JSON])
@click.argument("number", type=click.IntRange(1), metavar="[ID]", required=False)
@click.option("--state", type=click.Choice(["queued", "running", *OVER]), help="Only those.")
@click.option("--kind", help="Only those of a kind: build, train …")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The newest so many.")
def jobs(number: int | None, as_json: bool, **query: Any) -> None:
    """List the jobs of the server at PENSTOCK_URL, the newest last; or print all of one."""
    if number:
        listed = [server().json("GET", f"/v1/jobs/{number}", "state")]
    else:
        params = {name: value for name, value in query.items() if value}
        answer = server().json("GET", "/v1/jobs", "jobs", params=params)
        listed = answer["jobs"][::-1]
        if answer.get("next"):
            click.echo(f"the newest {len(listed):,}; there are more (--limit)", err=True)
    if as_json:
        lines = map(json_text, listed)
    else:
        lines = map(printable, _detail(listed[0]) if number else _table([_row(job) for job in listed]))
    for line in lines:
        click.echo(line)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    rows = [("ID", "KIND", "NAME", "STATE", "CREATED (UTC)", ""), *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(job: Job) -> tuple[str, ...]:
    created = job["created"][:16].replace("T", " ")
    return str(job["id"]), job["kind"], job["target"], job["state"], created, _standing(job)[:120]


def _standing(job: Job) -> str:
    """Return how far a job is, what it waits for, or why it failed."""
    progress = job["progress"]
    if job["state"] != "running" or not progress.get("total"):
        return job["reason"] or (f"waits for {job['waits_for']}" if job["waits_for"] else "")
    done, total, rate, left = (progress.get(name) or 0 for name in ("done", "total", "rate", "eta"))
    speed = f", {rate:,.1f}/s, {left / 60:,.0f} min left" if rate and left else ""
    return f"{100 * done // total} % of {total:,} {progress.get('unit', '')}{speed}"


def _detail(job: Job) -> Iterator[str]:
    """Yield a line for each value of a job that has one."""
    for name, value in (job | {"command": " ".join(job["command"])}).items():
        if value not in (None, "", {}):
            yield f"{name + ':':12} {value if isinstance(value, str) else json.dumps(value)}"


@click.command(cls=Command, params=[NUMBER, AS_JSON], interrupted=GOES_ON)
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job ends, and end with its exit code.")
def logs(number: int, as_json: bool, following: bool) -> None:
    """Print the log of a job: its command's messages as sentences, or with --json as they are."""
    job = follow(server(), number, shower(as_json), following)
    if following:
        finish(job)


@click.command(cls=Command, params=[NUMBER, AS_JSON])
def cancel(number: int, as_json: bool) -> None:
    """Cancel a job: it never begins, or its command is told to end, and killed if it does not."""
    source = server()
    report(source, source.json("POST", f"/v1/jobs/{number}/cancel", "id"), False, as_json)


@click.command(cls=Command, params=[NUMBER, WAIT, AS_JSON], interrupted=GOES_ON)
def retry(number: int, wait: bool, as_json: bool) -> None:
    """Submit a job again that failed or was cancelled; it goes on with what is there."""
    source = server()
    report(source, source.json("POST", f"/v1/jobs/{number}/retry", "id"), wait, as_json)
