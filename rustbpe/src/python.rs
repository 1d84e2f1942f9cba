//! The border to Python, and nothing else: conversions, errors, the GIL and signals.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList, PyString};

use crate::arrow::Source;
use crate::bpe::check_vocab_size;
use crate::{available_threads, Bpe, Check, Decoder, Error, Id, Splitter, Trainer, Vocab, GPT4_PATTERN};

const BUFFER_BYTES: usize = 8 << 20; // counted in well under a second, so that Ctrl-C is heard in time
const SIGNAL_PERIOD: Duration = Duration::from_millis(100);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::Interrupted => PyKeyboardInterrupt::new_err("interrupted"),
            Error::TooLarge => PyRuntimeError::new_err(error.to_string()),
            _ => PyValueError::new_err(error.to_string()),
        }
    }
}

/// A byte-level BPE tokenizer: train it, or build it from ranks, then encode and decode.
#[pyclass(name = "Tokenizer", module = "rustbpe", frozen)]
struct PyTokenizer {
    bpe: RwLock<Arc<Bpe>>,
}

impl PyTokenizer {
    fn wrap(bpe: Bpe) -> Self {
        PyTokenizer { bpe: RwLock::new(Arc::new(bpe)) }
    }

    fn bpe(&self) -> Arc<Bpe> {
        self.bpe.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[pymethods]
impl PyTokenizer {
    /// An untrained tokenizer: no pattern, and one token per byte.
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self::wrap(Bpe::new(Splitter::new("")?, Vocab::from_merges(&[])?)))
    }

    /// A tokenizer from (bytes, id) pairs, such as get_mergeable_ranks() returns, and a split pattern.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern))]
    fn from_ranks(py: Python<'_>, ranks: Vec<(Bound<'_, PyBytes>, Id)>, pattern: &str) -> PyResult<Self> {
        let ranks: Vec<_> = ranks.into_iter().map(|(token, id)| (token.as_bytes().to_vec(), id)).collect();
        let bpe = py.detach(|| Ok::<_, Error>(Bpe::new(Splitter::new(pattern)?, Vocab::from_ranks(ranks)?)));
        Ok(Self::wrap(bpe?))
    }

    /// Train on an iterator of str, or of Arrow arrays of strings, which are read in place. Texts are taken
    /// `buffer_size` at a time (or 8 MiB, if that is less) and counted in parallel without the GIL. Without a
    /// pattern, GPT-4's is used. Deterministic: the highest count first, then the smaller pair of ids. Ctrl-C
    /// stops it and leaves the tokenizer as it was.
    ///
    /// `progress(merges, of)` is called about ten times a second while merges are learned, and at their end; its
    /// exceptions stop the training.
    #[pyo3(signature = (iterator, vocab_size, buffer_size = 8192, pattern = None, num_threads = None,
                        progress = None))]
    #[allow(clippy::too_many_arguments)] // all but two have defaults and names in Python
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<&str>,
        num_threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        check_vocab_size(vocab_size)?;
        let splitter = Splitter::new(pattern.unwrap_or(GPT4_PATTERN))?;
        let mut trainer = Trainer::new(splitter, threads(num_threads));
        let mut buffer: Vec<PyBackedStr> = Vec::new();
        let mut bytes = 0;
        for item in iterator.try_iter()? {
            let item = item?;
            if !item.is_instance_of::<PyString>() && Source::is_arrow(&item)? {
                let mut source = Source::open(&item)?;
                while let Some(strings) = source.next()? {
                    let texts = strings.texts()?;
                    without_gil(py, |check| trainer.add(&texts, check))?;
                }
                continue;
            }
            let text: PyBackedStr = item.extract()?;
            bytes += text.len();
            buffer.push(text);
            if buffer.len() >= buffer_size || bytes >= BUFFER_BYTES {
                without_gil(py, |check| trainer.add(&buffer, check))?;
                buffer.clear();
                bytes = 0;
                py.check_signals()?;
            }
        }
        without_gil(py, |check| trainer.add(&buffer, check))?;
        drop(buffer);
        let wanted = vocab_size - 256;
        let merged = AtomicUsize::new(0);
        let tell = |py: Python<'_>| match &progress {
            Some(progress) => progress.call1(py, (merged.load(Ordering::Relaxed), wanted)).map(drop),
            None => Ok(()),
        };
        let bpe = without_gil_telling(py, &tell, |check| {
            trainer.finish(vocab_size, &mut || {
                merged.fetch_add(1, Ordering::Relaxed);
                check()
            })
        })?;
        merged.store(bpe.vocab().len() - 256, Ordering::Relaxed);
        tell(py)?;
        *self.bpe.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(bpe);
        Ok(())
    }

    /// The split pattern; empty before training.
    fn get_pattern(&self) -> String {
        self.bpe().pattern().to_string()
    }

    /// The number of tokens: 256 bytes and one per merge.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.bpe().vocab().len()
    }

    /// The tokens as (bytes, id) pairs in the order of their ids.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, Id)> {
        self.bpe().vocab().tokens().map(|(token, id)| (PyBytes::new(py, token), id)).collect()
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: PyBackedStr) -> PyResult<Vec<Id>> {
        let bpe = self.bpe();
        Ok(py.detach(|| bpe.encode(&text))?)
    }

    /// The ids of each text, in parallel; `num_threads` defaults to all.
    #[pyo3(signature = (texts, num_threads = None))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let bpe = self.bpe();
        let (ids, at) =
            without_gil(py, |check| bpe.encode_batch::<Id, _>(&texts, None, threads(num_threads), check))?;
        at.windows(2).map(|at| PyList::new(py, &ids[at[0] as usize..at[1] as usize])).collect()
    }

    /// The ids of all texts one after another as native int32, and how many belong to each text.
    #[pyo3(signature = (texts, num_threads = None))]
    fn batch_encode_buffer<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyByteArray>, Vec<i64>)> {
        let bpe = self.bpe();
        let (ids, at) =
            without_gil(py, |check| bpe.encode_batch::<Id, _>(&texts, None, threads(num_threads), check))?;
        let buffer = PyByteArray::new_with(py, ids.len() * 4, |bytes| {
            for (slot, id) in bytes.chunks_exact_mut(4).zip(&ids) {
                slot.copy_from_slice(&id.to_ne_bytes());
            }
            Ok(())
        })?;
        Ok((buffer, at.windows(2).map(|at| at[1] - at[0]).collect()))
    }

    /// The ids of an Arrow array (or stream) of strings as numpy arrays (tokens, offsets), nothing copied on the
    /// way in or out: text i is tokens[offsets[i]:offsets[i + 1]]. `prepend` is put in front of every text and
    /// may lie beyond the vocabulary; a null is no text and has no tokens. Tokens are uint16 if all ids fit,
    /// else int32; offsets are int64.
    #[pyo3(signature = (array, prepend = None, num_threads = None))]
    fn encode_arrow<'py>(
        &self,
        py: Python<'py>,
        array: &Bound<'py, PyAny>,
        prepend: Option<Id>,
        num_threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let bpe = self.bpe();
        let mut source = Source::open(array)?;
        let mut arrays = Vec::new();
        while let Some(strings) = source.next()? {
            arrays.push(strings);
        }
        let mut texts = Vec::new();
        for strings in &arrays {
            texts.extend(strings.texts()?);
        }
        let largest = bpe.vocab().largest_id().max(prepend.unwrap_or(0));
        if largest > i32::MAX as Id {
            return Err(PyValueError::new_err(format!("prepend must be below 2^31, found {largest}")));
        }
        let threads = threads(num_threads);
        let (ids, at) = without_gil(py, |check| {
            Ok(if largest <= Id::from(u16::MAX) {
                let (ids, at) = bpe.encode_batch(&texts, prepend, threads, check)?;
                (Numbers::U16(ids), at)
            } else {
                let (ids, at) = bpe.encode_batch(&texts, prepend, threads, check)?;
                (Numbers::I32(ids), at)
            })
        })?;
        Ok((ids.into_numpy(py)?, Numbers::I64(at).into_numpy(py)?))
    }

    /// The text of ids; bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, py: Python<'_>, ids: Vec<Id>) -> PyResult<String> {
        let bpe = self.bpe();
        let bytes = py.detach(|| bpe.decode(&ids))?;
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    /// The bytes of ids.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<Id>) -> PyResult<Bound<'py, PyBytes>> {
        let bpe = self.bpe();
        Ok(PyBytes::new(py, &py.detach(|| bpe.decode(&ids))?))
    }

    /// A decoder for ids that arrive one by one.
    fn decoder(&self) -> PyDecoder {
        PyDecoder { bpe: self.bpe(), decoder: Decoder::default() }
    }

    fn __repr__(&self) -> String {
        format!("Tokenizer(vocab_size={})", self.vocab_size())
    }
}

/// Text while its ids arrive: what push() returns, one after another, and finish() at the end, is what decode()
/// gives for all ids at once. A character that is not whole yet is held back.
#[pyclass(name = "Decoder", module = "rustbpe")]
struct PyDecoder {
    bpe: Arc<Bpe>,
    decoder: Decoder,
}

#[pymethods]
impl PyDecoder {
    /// The text that is certain after one more id.
    fn push(&mut self, id: Id) -> PyResult<String> {
        Ok(self.decoder.push(self.bpe.vocab().token(id)?))
    }

    /// The same for bytes, such as the name of a special token.
    fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.decoder.push(bytes)
    }

    /// The rest: U+FFFD if a character was left unfinished.
    fn finish(&mut self) -> String {
        self.decoder.finish()
    }
}

/// Numbers on their way to numpy.
enum Numbers {
    U16(Vec<u16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
}

impl Numbers {
    /// A numpy array over the same memory, which lives as long as the array.
    fn into_numpy(mut self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        let (address, len, kind) = match &mut self {
            Numbers::U16(some) => (some.as_mut_ptr() as usize, some.len(), "u2"),
            Numbers::I32(some) => (some.as_mut_ptr() as usize, some.len(), "i4"),
            Numbers::I64(some) => (some.as_mut_ptr() as usize, some.len(), "i8"),
        };
        let order = if cfg!(target_endian = "little") { "<" } else { ">" };
        let memory = PyMemory { _numbers: self, address, len, kind: format!("{order}{kind}") };
        py.import("numpy")?.call_method1("asarray", (memory,))
    }
}

/// Memory that numpy reads and writes through its array interface. Nothing else looks at it again.
#[pyclass(name = "Memory", module = "rustbpe", frozen)]
struct PyMemory {
    _numbers: Numbers,
    address: usize,
    len: usize,
    kind: String,
}

#[pymethods]
impl PyMemory {
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("shape", (self.len,))?;
        interface.set_item("typestr", &self.kind)?;
        interface.set_item("data", (self.address, false))?; // not read-only
        Ok(interface)
    }
}

fn threads(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(available_threads)
}

/// Runs `work` without the GIL. Its `check` hears Ctrl-C, and raises what the signal handler raises.
fn without_gil<R: Send>(
    py: Python<'_>,
    work: impl FnOnce(Check<'_>) -> Result<R, Error> + Send,
) -> PyResult<R> {
    without_gil_telling(py, &|_| Ok(()), work)
}

/// The same, and calls `tell` each time.
fn without_gil_telling<R: Send>(
    py: Python<'_>,
    tell: &(dyn Fn(Python<'_>) -> PyResult<()> + Sync),
    work: impl FnOnce(Check<'_>) -> Result<R, Error> + Send,
) -> PyResult<R> {
    let (result, signal) = py.detach(|| {
        let mut signal = None;
        let mut heard = Instant::now();
        let result = work(&mut || {
            if heard.elapsed() < SIGNAL_PERIOD {
                return Ok(());
            }
            heard = Instant::now();
            Python::attach(|py| py.check_signals().and_then(|()| tell(py))).map_err(|error| {
                signal = Some(error);
                Error::Interrupted
            })
        });
        (result, signal)
    });
    signal.map_or_else(|| Ok(result?), Err)
}

/// Byte-pair encoding in Rust.
#[pymodule(gil_used = false)]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<PyDecoder>()?;
    module.add_class::<PyTokenizer>()
}
