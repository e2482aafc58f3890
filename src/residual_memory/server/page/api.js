// What the server is asked, and its refusals as errors with a cause and a remedy.

export class Refusal extends Error {
  constructor(status, cause, remedy) {
    super(cause);
    this.status = status;
    this.remedy = remedy;
  }
}

async function checked(promise) {
  let response;
  try {
    response = await promise;
  } catch {
    throw new Refusal(0, "The server does not answer", "is it still running?");
  }
  if (response.ok) return response;
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // not one of ours: the status has to do
  }
  throw new Refusal(response.status, told.cause ?? `The server answered ${response.status}`, told.remedy ?? "");
}

export async function get(path) {
  return (await checked(fetch(path))).json();
}

export async function post(path, body) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return (await checked(fetch(path, options))).json();
}

export async function send(path, file) {
  return (await checked(fetch(path, { method: "POST", body: file }))).json();
}

// What takes the server a while: asked again until it is there.
export async function patiently(path, told, read = (response) => response.json()) {
  for (;;) {
    const response = await checked(fetch(path));
    if (response.status !== 202) return read(response);
    told((await response.json()).progress);
    await new Promise((done) => setTimeout(done, 700));
  }
}
